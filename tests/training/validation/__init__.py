"""Tests of `scgpt_hf.training.validation`."""
