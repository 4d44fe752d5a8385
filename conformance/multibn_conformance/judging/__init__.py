"""Run a case on a subject, compare the answer with the oracle, and say what is wrong."""
