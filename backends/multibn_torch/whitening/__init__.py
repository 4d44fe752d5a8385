"""Whitening as a PyTorch module."""
