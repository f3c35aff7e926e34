"""The mathematics of a training step."""
