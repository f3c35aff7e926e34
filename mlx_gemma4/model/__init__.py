"""What Gemma 4 is, and how it gets into memory."""

import os

# transformers would advise everyone who trains with MLX to install torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
