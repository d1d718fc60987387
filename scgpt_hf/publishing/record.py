"""Reads what a run folder records, for those who tell others about it; leaves out what only holds on this machine.

How each file gets into the folder is in `run_folder.py`; what is made of it in `card.py` and `hub.py`.
"""

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

UNKNOWN = "not recorded"
_MOST_NAMED = 30  # values of an obs column that are told
_SECRETS = frozenset({"hub_token", "push_to_hub_token"})


class Record:
    """A JSON or YAML file of the run folder, read by dotted keys; a file or key that is not there gives None."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ValueError: the file is malformed, or holds no mapping.
        """
        self.name = path.name
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
            content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path.name} is malformed: {error}; write it anew or delete it") from error
        if not isinstance(content, dict):
            raise ValueError(f"expected keys and values in {path.name}, found {type(content).__name__}")
        self.content = portable(content)

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value at a dotted key, or None.

        Raises:
            ValueError: the value, or one on the way to it, is of another kind; the message names file and key.
        """
        value: Any = self.content
        parts = key.split(".")
        for depth, part in enumerate(parts, start=1):
            value = value.get(part)
            wanted = kind if depth == len(parts) else dict
            if value is None:
                return None
            if not isinstance(value, wanted) or isinstance(value, bool):
                names = [one.__name__ for one in (wanted if isinstance(wanted, tuple) else (wanted,))]
                where = ".".join(parts[:depth])
                raise ValueError(f"{self.name}: expected {' or '.join(names)} at {where!r}, found {str(value)[:80]!r}")
        return value

    def number(self, key: str, form: str = ",") -> str:
        """Return a number as text, by a format specification; see `get`."""
        value = self.get(key, (int, float))
        try:
            return UNKNOWN if value is None else format(value, form)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{self.name}: expected a whole number at {key!r}, found {str(value)[:80]}") from error

    def text(self, key: str) -> str:
        """Return a text; see `get`."""
        return str(self.get(key, str) or UNKNOWN)


def composition(summary: Record, column: str) -> str:
    """Return the most frequent values of an obs column with their number of cells, and how many more there are.

    Raises:
        ValueError: a number of cells is none.
    """
    cells = summary.get(f"composition.{column}", dict) or {}
    if not all(isinstance(number, int) for number in cells.values()):
        raise ValueError(f"{summary.name}: expected numbers of cells at 'composition.{column}', found {cells}")
    named = [f"{name} ({cells[name]:,})" for name in sorted(cells, key=lambda one: -cells[one])]
    more = [f"and {len(named) - _MOST_NAMED:,} more"] if len(named) > _MOST_NAMED else []
    return ", ".join(named[:_MOST_NAMED] + more) or UNKNOWN


def portable(value: Any) -> Any:
    """Return JSON-like content without what should not leave this machine: tokens, and where files lie on it.

    Absolute paths, paths out of the folder and addresses (s3://, file://, https://) become their last part; those of
    the Census (census://) and of the Hub (hf://) stay.
    """
    if isinstance(value, dict):
        return {portable(key): portable(item) for key, item in value.items() if key not in _SECRETS}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if not isinstance(value, str) or value.startswith(("census://", "hf://")):
        return value
    if re.match(r"[A-Za-z]:[\\/]|\\\\", value):
        return PureWindowsPath(value).name
    return PurePosixPath(value).name if re.match(r"[/~]|\.\./|[A-Za-z0-9+]+://", value) else value
