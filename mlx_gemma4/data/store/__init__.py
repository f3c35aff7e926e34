"""Examples as arrays, in memory or memory-mapped from the cache."""
