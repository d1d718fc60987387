"""Read raw counts of cells from any source, select cells and genes, and plan the order in which they are read.

Readers limit child processes, rename folders and keep open files that are removed, which needs POSIX. The model and its
processor do not need this package.
"""

import os

if os.name != "posix":
    raise ImportError(
        "scgpt_hf reads cells and trains on Linux and macOS, not on native Windows; run it in WSL 2 (wsl --install)"
    )
