"""Code that several test modules share: local servers, contract tests, small inputs.

Test modules import shared code from this package only, never from each other.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
