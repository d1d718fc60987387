"""Tests of the pipeline from cells to batches."""
