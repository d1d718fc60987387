"""Fine-tune a pretrained model: to annotate cell types, or to integrate experimental batches."""
