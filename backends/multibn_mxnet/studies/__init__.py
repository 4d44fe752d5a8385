"""Studies of the Gluon blocks: the article's networks and the benchmark."""
