"""What ``multibn bench`` and ``multibn article`` run in JAX."""
