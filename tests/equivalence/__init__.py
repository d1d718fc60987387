"""Tests of equivalence."""
