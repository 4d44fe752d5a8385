"""Synchronised statistics judged: the clauses SY-01 to SY-11, over ranks in processes, or in threads."""
