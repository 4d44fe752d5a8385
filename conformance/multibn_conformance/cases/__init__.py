"""The cases: fixed and random ones, and their inputs."""
