"""Tests of run records and model cards."""
