"""A raw row -> token ids and loss mask, through the chat template of the model."""
