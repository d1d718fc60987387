"""Figures and report pages of runs and evaluations."""
