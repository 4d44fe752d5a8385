"""Defective BatchNorms that the suite must catch, by the clause that each breaks: to test the suite, and to diagnose failures.

Not covered is what the interface of a subject does not show: it gives values and first gradients, so the suite cannot see a wrong
second derivative (pytorch#196699, pytorch#186256). The tests of a layer that promises one check it with its framework's tools.
"""

from __future__ import annotations

from . import bits, edges, formulas, moving, sums
from .defect import REGISTERED, Defect

assert all((sums, formulas, moving, edges, bits))  # importing them registers their classes

DEFECTS: dict[str, Defect] = {each.id: each for each in REGISTERED}
"""Every defect, by its id."""
