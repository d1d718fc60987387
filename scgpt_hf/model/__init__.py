"""The scGPT model: configuration, encoder, heads and objectives.

`save_pretrained` uploads these modules with the weights. They import each other by `from .x import y`, and besides only
torch and transformers, so that a checkpoint loads without this package.
"""
