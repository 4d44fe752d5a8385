"""What all layers share: array types, checks of the input with their messages, and the non-finite warning."""

from .nonfinite import PoisonedBatch as PoisonedBatch
