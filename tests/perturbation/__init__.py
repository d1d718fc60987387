"""Tests of perturbation prediction."""
