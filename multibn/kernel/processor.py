"""The processor's floating-point mode: the kernel's passes round to nearest and keep denormals, whatever the process has set.

``torch.set_flush_denormal``, libraries built with ``-ffast-math`` and XLA's threads can set a thread to flush denormals to zero.
Each pass sets the default mode and restores the old one afterwards, so that BN-15 and BN-16 hold in such threads too.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compat import get_or_insert_function

_X86_DEFAULT = 0x1F80
"""MXCSR default value: round to nearest, keep denormals, all exceptions masked."""


@intrinsic
def set_default_mode(_: Any) -> Any:  # pragma: no cover - runs in the compiler
    """Round to nearest and keep denormals in this thread; returns the mode before, for ``restore_mode``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = _machine(context)
        if kind == "x86":
            old = _store_mxcsr(builder)
            _load_mxcsr(builder, ir.Constant(ir.IntType(32), _X86_DEFAULT))
            return builder.zext(old, ir.IntType(64))
        if kind == "arm":
            old = _intrinsic(builder, "llvm.aarch64.get.fpcr", ir.IntType(64), [])
            _intrinsic(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [ir.Constant(ir.IntType(64), 0)])
            return old
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(), generate


@intrinsic
def restore_mode(_: Any, mode: Any) -> Any:  # pragma: no cover - runs in the compiler
    """Restore what ``set_default_mode`` returned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = _machine(context)
        if kind == "x86":
            _load_mxcsr(builder, builder.trunc(arguments[0], ir.IntType(32)))
        elif kind == "arm":
            _intrinsic(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [arguments[0]])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _machine(context: Any) -> str:  # pragma: no cover - runs in the compiler
    triple = str(context.codegen().magic_tuple()[0])
    return "x86" if triple.startswith(("x86_64", "amd64", "i686")) else "arm" if triple.startswith(("aarch64", "arm64")) else ""


def _intrinsic(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:  # pragma: no cover - runs in the compiler
    kind = ir.FunctionType(result, [each.type for each in arguments])
    return builder.call(get_or_insert_function(builder.module, kind, name), arguments)


def _store_mxcsr(builder: Any) -> Any:  # pragma: no cover - runs in the compiler
    place = builder.alloca(ir.IntType(32))
    byte = builder.bitcast(place, ir.IntType(8).as_pointer())
    _intrinsic(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [byte])
    return builder.load(place)


def _load_mxcsr(builder: Any, value: Any) -> None:  # pragma: no cover - runs in the compiler
    place = builder.alloca(ir.IntType(32))
    builder.store(value, place)
    byte = builder.bitcast(place, ir.IntType(8).as_pointer())
    _intrinsic(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [byte])
