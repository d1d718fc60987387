"""From counts to what the model reads."""
