"""Where cells come from: sources of raw counts, which cells and genes to use, and in which order to read them."""
