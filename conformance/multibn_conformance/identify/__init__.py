"""Determine the dialect of a black box from its answers."""
