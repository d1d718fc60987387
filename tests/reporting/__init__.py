"""Tests of figures and report pages."""
