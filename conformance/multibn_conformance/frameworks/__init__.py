"""The frameworks' own layers, judged by the dialects they claim."""
