"""Tests of fault_tolerance."""
