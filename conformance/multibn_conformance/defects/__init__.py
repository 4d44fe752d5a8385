"""Known wrong BatchNorms, each of which the suite must catch."""
