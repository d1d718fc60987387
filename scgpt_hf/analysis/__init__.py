"""Use trained models: embed and annotate cells, predict expression, analyse genes, evaluate embeddings."""
