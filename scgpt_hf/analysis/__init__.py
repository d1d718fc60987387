"""Use trained models: embed and annotate cells, predict expression, analyze genes, evaluate embeddings."""
