"""Tests of `scgpt_hf.cells.schedule`."""
