"""Tests of `scgpt_hf.scoring`."""
