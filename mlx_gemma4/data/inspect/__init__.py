"""A look at the data: counts, and examples for the eye."""
