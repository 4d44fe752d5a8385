"""Calls of blocks with CPU arrays: run the kernel on MXNet's memory, without an operator."""
