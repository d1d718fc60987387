"""Command line: one module per command; `scripts/` launches them."""
