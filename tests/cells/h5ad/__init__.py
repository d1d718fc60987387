"""Tests of h5ad."""
