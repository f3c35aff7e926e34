"""The cache of tokens, and the processes that make them."""
