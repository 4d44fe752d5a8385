"""Wrong BatchNorms that the suite must catch, by the clause that each breaks. They measure the suite, and name what fails it.

What no subject can show is not here: a subject gives values and first gradients, so a wrong second derivative (pytorch#196699,
pytorch#186256) is invisible to it. Layers that promise one test it by themselves, with their framework's own means.
"""

from __future__ import annotations

from . import bits, edges, formulas, moving, sums
from .defect import REGISTERED, Defect

assert all((sums, formulas, moving, edges, bits))  # importing them registers their classes

DEFECTS: dict[str, Defect] = {each.id: each for each in REGISTERED}
"""Every defect, by its id."""
