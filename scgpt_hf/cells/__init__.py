"""Read raw counts of cells from any source, select cells and genes, and plan the order in which they are read."""
