"""Launch a Triton kernel.

In every launch, Triton examines each argument, looks the compiled kernel up and fills in defaults, which takes longer than most
passes. Here, the launches after the first find the compiled kernel by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch: no contraction (BN-15)."""

DIRECT = triton.__version__.startswith("3.6.")
"""Whether a compiled kernel takes its arguments as this module passes them. With other releases, every launch is Triton's own."""

ALIGNED = 16
"""Triton compiles another kernel for an address that is not a multiple of this."""

_found: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = {}
"""What was launched -> how to launch it again, and the arguments after the pointers."""


def launch(
    kernel: Any, programs: int, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], constants: dict[str, Any], warps: int
) -> None:
    """Launch ``kernel(*tensors, *sizes, **constants)`` on the current stream of the current device, which is that of the tensors.

    Args:
        kernel: one of ``passes``.
        programs: how many run it.
        constants: its compile-time arguments.
        warps: of each program.
    """
    key = id(kernel), programs, sizes, warps, *constants.values(), tensors[0].get_device(), *[t.dtype for t in tensors]
    again = _found.get(key)
    if again is not None:
        run, rest = again
        pointers = [t.data_ptr() for t in tensors]
        if aligned(pointers):
            run(*pointers, *rest)
            return
    compiled = kernel[(programs,)](*tensors, *sizes, **constants, num_warps=warps, **EXACT)
    if DIRECT and compiled is not None and aligned([t.data_ptr() for t in tensors]):  # None: in the interpreter
        if len(_found) >= 4096:
            _found.clear()
        order = kernel.arg_names[len(tensors) + len(sizes) :]
        _found[key] = compiled[(programs, 1, 1)], (*sizes, *(constants[name] for name in order))


def aligned(pointers: list[int]) -> bool:
    """Return whether all addresses are multiples of ALIGNED."""
    together = 0
    for pointer in pointers:
        together |= pointer
    return together % ALIGNED == 0
