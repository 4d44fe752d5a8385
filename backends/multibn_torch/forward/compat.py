"""Load ``fusion``, which uses private parts of Inductor. Where a release of PyTorch lacks one, compiled programs are slower."""

from __future__ import annotations

import sys
from contextlib import suppress


def install_passes() -> None:
    """Let the compiler that is tracing, if it is Inductor, run ``fusion`` and leave the user's own passes in place."""
    if "torch._inductor.config" not in sys.modules:  # nothing compiles, or not with Inductor
        return
    with suppress(ImportError):
        from . import fusion

        fusion.install()
