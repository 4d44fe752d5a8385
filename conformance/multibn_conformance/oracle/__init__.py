"""The oracle: exact values by a second derivation, and the bounds within which an answer is right."""
