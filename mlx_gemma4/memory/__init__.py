"""What a training step takes: a closed formula, a measurement on the device, and a choice."""
