"""Scores of cell types at each validation, and the simple methods that a run is compared with."""
