"""Synchronised BatchNorms that do what a rank should not; test_sync_suite.py runs them in processes."""

from __future__ import annotations

import os
import sys

from multibn.layer.types import Array
from multibn_conformance.synchronised.right import Right


class Talks(Right):
    """A right one that prints."""

    def moving(self) -> tuple[Array, Array]:
        if not self.batches:
            self.batches = 1
            print(f"multibn: rank {self.group.rank} talks", file=sys.stderr)
        return super().moving()


class Ends(Right):
    """Rank 1 ends its process."""

    def forward(self, x: Array, training: bool) -> Array:
        if self.group.rank == 1:
            print("that is all", file=sys.stderr, flush=True)
            os._exit(7)
        return super().forward(x, training)
