"""Score embeddings and predicted labels, and compute the simple methods that they are compared with."""
