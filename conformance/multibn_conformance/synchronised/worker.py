"""A process that is a rank of whatever backend it is told to be, until its connection ends."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from importlib import import_module
from multiprocessing.connection import Client

from multibn_conformance.subjects.backends import backends

from .hub import CONTROL, HubGroup, RemoteHub
from .perform import MakeSynchronised, perform


def _maker(name: str) -> MakeSynchronised:
    """Of a backend, or of a class ``module:class``."""
    module, _, made = name.partition(":")
    if made:
        return getattr(import_module(module), made)
    ((backend, _),), _ = backends([name])
    assert backend.synchronised is not None
    return backend.synchronised


def main() -> None:
    """Answer cases."""
    address, secret = os.environ["MULTIBN_HUB"], os.environ["MULTIBN_HUB_SECRET"].encode()
    rank, size = map(int, sys.argv[1:])
    control = Client(address, authkey=secret)
    control.send((CONTROL, rank, size))
    hub = RemoteHub(address, secret)
    warnings.simplefilter("ignore")  # some cases are poisoned on purpose
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, case, key, its_rank, its_size, world = control.recv()
            try:
                group = HubGroup(hub, key, its_rank, its_size, case.timeout)
                group.world = HubGroup(hub, world, rank, size, case.timeout) if its_size < size else None
                control.send(perform(_maker(name), case, its_rank, group))
            except Exception:
                control.send(traceback.format_exc())


if __name__ == "__main__":
    main()
    os._exit(0)  # frameworks may wait for what never comes
