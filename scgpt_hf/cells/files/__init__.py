"""Files of cells, such as .h5ad, and AnnData."""
