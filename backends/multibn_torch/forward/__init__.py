"""Implementations of a layer's forward, and the dispatch to them."""
