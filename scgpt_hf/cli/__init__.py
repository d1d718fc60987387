"""The commands: one module each, launched by `scgpt-hf NAME` and by the files in `scripts/`.

Only they may change the state of the process.
"""
