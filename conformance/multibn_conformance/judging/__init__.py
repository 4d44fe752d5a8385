"""Run a case on a subject, compare the answers with the oracle, and describe failures."""
