"""Publish models and data sets on the Hub, with cards that state what a run records."""
