"""The forward of a layer: dispatch, and each way of computing it."""
