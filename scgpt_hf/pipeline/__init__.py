"""The pipeline from cells to batches of tensors, shared by training, validation, embedding and prediction."""
