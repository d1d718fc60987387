"""Tests of what uses trained models."""
