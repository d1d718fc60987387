"""Which cells and genes a run uses, and which cells train or validate."""
