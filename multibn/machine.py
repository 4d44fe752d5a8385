"""The machine that a measurement or a report is made on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor(count: bool = False, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, as Linux or else Python knows it.

    Args:
        count: add the number of logical processors, where Linux lists them.
        cpuinfo: Linux's list.
    """
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if not names:
        return platform.processor() or platform.machine()
    return f"{names[0]}, {len(names)} processors" if count else names[0]
