"""Judges whitening layers by the clauses WH of ``multibn.whitening``, beside BatchNorm and by the same commands."""
