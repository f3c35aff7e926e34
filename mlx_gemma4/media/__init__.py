"""Images and recordings -> what the encoders take, equal to transformers' processors."""
