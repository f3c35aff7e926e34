"""A look at the data: counts, and examples to look at."""
