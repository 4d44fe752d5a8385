"""Tests of multibn_jax run in an environment of their own, since JAX needs NumPy 2 and MXNet NumPy 1: ``make test-jax``."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
