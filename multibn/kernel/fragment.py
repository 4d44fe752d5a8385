"""Compile functions that only compiled code calls: fragments.

Numba optimises each function and generates machine code for it, and does both again in every caller, into which it links the
function. A fragment stops at LLVM's intermediate code; only its callers are optimised. That takes about a quarter off the time in
which the kernel is compiled.
"""

from __future__ import annotations

from typing import Any

from .compat import CompilerBase, DefaultPassBuilder, JITCodeLibrary, LoweringPass, NativeLowering, register_pass


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """The code of a fragment. It is not added to the execution engine, where callers would find it instead of their own optimised
    copy, which has the same names.
    """

    codegen: Any = property(lambda self: _Nowhere())

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """No address: nothing but compiled code calls it."""
        return 0


class _Nowhere:
    def set_env(self, *_: Any) -> None:
        """Numba would write the address of the function's environment into the machine code."""


@register_pass(mutates_CFG=False, analysis_only=True)
class _Begin(LoweringPass):  # type: ignore[misc]
    """Let the lowering that follows write into a ``_Library``."""

    _name = "begin_fragment"

    def __init__(self) -> None:  # abstract in the base class
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        """Called by Numba."""
        state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)
        return True


class Fragment(CompilerBase):  # type: ignore[misc]
    """Numba's ``pipeline_class`` for a fragment."""

    def define_pipelines(self) -> list[Any]:
        """Called by Numba."""
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes = [each for each, _ in pipeline.passes]
        pipeline.add_pass_after(_Begin, passes[passes.index(NativeLowering) - 1])
        pipeline.finalize()
        return [pipeline]
