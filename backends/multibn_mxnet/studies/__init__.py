"""What measures and shows the Gluon blocks: the article's networks and the benchmark."""
