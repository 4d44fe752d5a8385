"""How Numba compiles a function that only compiled code calls (a fragment).

By itself, Numba optimises each function and generates its machine code, and does both again for every caller, which contains a
copy. A fragment stays unoptimised intermediate code of LLVM; a caller is optimised together with its copies. Compiling the kernel
takes about three quarters of the time.
"""

from __future__ import annotations

from typing import Any

from .compat import CompilerBase, DefaultPassBuilder, JITCodeLibrary


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """The code of a fragment. It is not added to the execution engine, which would let callers run it instead of their optimised
    copies, because both have the same name.
    """

    codegen: Any = property(lambda self: _Nowhere())

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Return 0, as Numba does for a name without machine code."""
        return 0


class _Nowhere:
    def set_env(self, *_: Any) -> None:
        """Called by Numba to write to a variable of the machine code, of which there is none."""


class Fragment(CompilerBase):  # type: ignore[misc]
    """Numba's ``pipeline_class`` for a fragment."""

    def define_pipelines(self) -> list[Any]:
        """Called by Numba: its usual passes, which write into a ``_Library``."""
        self.state.library = _Library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]
