"""The forward of a layer: dispatch and the implementations."""
