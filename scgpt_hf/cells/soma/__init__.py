"""soma."""
