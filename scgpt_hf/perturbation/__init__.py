"""Predict what a genetic perturbation does to the expression of a cell: train, predict, and compare with baselines."""
