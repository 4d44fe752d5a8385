"""Load ``inductor``, which uses private parts of Inductor; if PyTorch lacks one, compiled programs run without fusion, slower."""

from __future__ import annotations

import sys
from contextlib import suppress


def install_passes() -> None:
    """Install the passes of ``inductor`` if Inductor is the compiler; keep the user's own passes."""
    if "torch._inductor.config" not in sys.modules:  # no compilation, or another compiler
        return
    with suppress(ImportError):
        from . import inductor

        inductor.install()
