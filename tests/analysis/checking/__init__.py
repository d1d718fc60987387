"""Tests of the check of files."""
