"""Convert original scGPT checkpoints to the format of this package."""
