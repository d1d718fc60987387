"""Evaluate embeddings of labelled cells: integration metrics, predicted cell types, and baselines to compare with."""
