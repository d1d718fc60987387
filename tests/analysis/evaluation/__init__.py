"""Tests of `scgpt_hf.analysis.evaluation`."""
