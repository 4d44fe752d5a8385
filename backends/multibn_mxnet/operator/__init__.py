"""The Custom operator, which puts the kernel into MXNet's graphs."""
