"""The frameworks' own layers as subjects; each file runs where its framework is installed."""
