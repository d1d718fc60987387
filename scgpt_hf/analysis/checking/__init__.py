"""Check files of cells before any work."""
