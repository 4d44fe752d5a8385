"""Resident memory of this process and its peak, as Linux counts them."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from multibn import memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def begin() -> float:
    """Return free memory to the system, restart the peak, and return the resident MiB."""
    gc.collect()
    memory.release()
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    return _mib("VmRSS")


def peak(start: float) -> float:
    """Return the largest growth of the resident memory, in MiB, since ``begin`` returned ``start``."""
    return _mib("VmHWM") - start


def _mib(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
