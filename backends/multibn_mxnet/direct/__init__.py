"""Blocks called with arrays on a CPU: the kernel runs on MXNet's memory, without an operator."""
