"""The fixed cases, clause by clause."""

from multibn.spec.clauses import CLAUSES
from multibn_conformance.cases.case import Case

from .accuracy import accuracy
from .edges import edges, types
from .formulas import formulas
from .modes import modes
from .moving import moving
from .shapes import shapes
from .state import bits, state

CASES: dict[str, Case] = {
    case.id: case for group in (shapes, formulas, moving, modes, types, edges, state, bits, accuracy) for case in group()
}
"""Every fixed case, by its id."""

assert {case.clause for case in CASES.values()} == set(CLAUSES), "a clause without a case"
