"""`set_verbosity` shows messages of the package, and leaves a program that has configured logging alone."""

import subprocess
import sys

import pytest

from scgpt_hf import set_verbosity

CODE = """
import logging, sys
import scgpt_hf
if sys.argv[2] == "configured":
    logging.basicConfig(format="mine: %(message)s")
scgpt_hf.set_verbosity(sys.argv[1])
scgpt_hf.set_verbosity(sys.argv[1])
logger = logging.getLogger("scgpt_hf.cells.anything")
logger.info("read")
logger.warning("odd")
"""


def messages(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_levels_and_handlers():
    assert messages("info", "plain") == ["read", "odd"]
    assert messages("error", "configured") == []
    assert messages("info", "configured") == ["mine: read", "mine: odd"]


def test_an_unknown_level_raises():
    with pytest.raises(ValueError, match="unknown level 'loud'; expected one of debug, info, warning, error"):
        set_verbosity("loud")
