"""The Custom operator, which runs the kernel in MXNet's graphs."""
