"""Stored numbers, and the scripts that computed them."""
