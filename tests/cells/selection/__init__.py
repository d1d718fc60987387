"""Tests of `scgpt_hf.cells.selection`."""
