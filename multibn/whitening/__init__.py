"""Whitening, which BatchNorm approximates: clauses, spec, derivation, reference, kernel and layer."""

from .derivation import Whitened as Whitened
from .derivation import whiten as whiten
from .layer import Whitening as Whitening
from .spec import CLAUSES as CLAUSES
from .spec import KINDS as KINDS
from .spec import WhiteningSpec as WhiteningSpec
