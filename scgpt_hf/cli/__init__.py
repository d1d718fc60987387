"""The commands: one module each, launched by `scgpt-hf NAME` and by the files in `scripts/`.

Only they may change the state of the process.
"""

import sys

try:
    import scgpt_hf.cells  # noqa: F401 (raises where it cannot work)
except ImportError as error:
    sys.exit(str(error))
