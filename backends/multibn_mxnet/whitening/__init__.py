"""Whitening as a Gluon block."""
