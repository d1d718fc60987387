"""From counts to tokens to batches: the processor and its steps.

`save_pretrained` uploads these modules with the weights. They import each other by `from .x import y`, and besides only
numpy, torch and transformers, so that a checkpoint loads without this package.
"""
