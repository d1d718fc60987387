"""Tests of training.estimate."""
