"""Studies of the PyTorch layers: the article's networks and the benchmarks."""
