"""Image files -> what the model's processor makes of them."""
