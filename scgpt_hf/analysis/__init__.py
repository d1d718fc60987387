"""What weights are for: embedding, annotating, scoring and drawing cells."""
