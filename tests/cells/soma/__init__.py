"""Tests of soma."""
