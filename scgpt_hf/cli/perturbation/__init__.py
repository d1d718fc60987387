"""The command `perturb`: train, predict and evaluate."""
