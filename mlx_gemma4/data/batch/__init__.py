"""Examples -> batches: which share a row, and the arrays of a batch."""
