"""What Gemma 4 is, and how it gets into memory."""
