"""Measure the layers: contestants take turns in one process, and the medians of their ratios are reported."""
