"""What all contestants share: the LoRA set and the learning rate."""

RANK = 8
SCALE = 2.0
"""alpha / rank."""

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TARGETS = [f"self_attn.{name}" for name in MODULES[:4]] + [f"mlp.{name}" for name in MODULES[4:]]
"""The same by their path within a layer."""

LEARNING_RATE = 1e-6
"""So small that the loss of an epoch does not depend on the order of its batches."""
