"""What measures and shows the PyTorch layers: the article's networks and the benchmarks."""
