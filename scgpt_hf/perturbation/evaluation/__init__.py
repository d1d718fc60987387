"""Score perturbation models on held-out conditions, beside simple predictors on the same split."""
