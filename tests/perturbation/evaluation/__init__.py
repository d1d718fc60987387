"""Tests of metrics and baselines."""
