"""The function the weights compute: configuration, encoder, heads, objectives."""
