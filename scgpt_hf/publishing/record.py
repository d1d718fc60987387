"""Read the files that a run leaves in its folder, and remove what must not leave this machine.

`run_summary.py` turns these files into the facts that model cards and reports show. `training/run_folder.py` writes
them.
"""

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

UNKNOWN = "not recorded"
_SECRETS = frozenset({"hub_token", "push_to_hub_token"})


class RunRecord:
    """The content of a JSON or YAML file of a run, with values looked up by dotted keys.

    Tokens and local paths are removed when the record is made (see `strip_private`), so text built from a record
    can be published. A missing key is not an error: runs in progress and older runs lack some values.

    Example:
        >>> record = RunRecord({"best": {"eval_loss": 2.5}}, "summary.json")
        >>> record.number("best.eval_loss", ".2f")
        '2.50'
        >>> record.text("device")
        'not recorded'

    Attributes:
        name: file name, for error messages.
        content: the values, without private ones.
    """

    def __init__(self, content: dict[str, Any], name: str) -> None:
        """Keep the content without private values.

        Args:
            content: JSON-like values, as written to the file.
            name: file name, for error messages.
        """
        self.name = name
        self.content: dict[str, Any] = strip_private(content)

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read a JSON or YAML file; a missing file gives an empty record.

        Raises:
            ValueError: the file is malformed, or holds something other than a mapping.
        """
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
            content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path.name} is malformed: {error}; write the file again or delete it") from error
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping in {path.name}, found {type(content).__name__}")
        return cls(content, path.name)

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value at a dotted key, or None if there is none.

        Args:
            key: e.g. "best.eval_loss".
            kind: type or types that the value must have; booleans are never accepted as numbers.

        Raises:
            ValueError: the value, or a value on the path to it, has another type. The message names file and key.
        """
        value: Any = self.content
        parts = key.split(".")
        for depth, part in enumerate(parts, start=1):
            value = value.get(part)
            wanted = kind if depth == len(parts) else dict
            if value is None:
                return None
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                names = [one.__name__ for one in (wanted if isinstance(wanted, tuple) else (wanted,))]
                where = ".".join(parts[:depth])
                raise ValueError(f"{self.name}: expected {' or '.join(names)} at {where!r}, found {str(value)[:80]!r}")
        return value

    def number(self, key: str, form: str = ",") -> str:
        """Return a number as text, or `UNKNOWN`.

        Args:
            key: dotted key.
            form: format specification.

        Raises:
            ValueError: the value is not a number, or does not fit the format.
        """
        value = self.get(key, (int, float))
        try:
            return UNKNOWN if value is None else format(value, form)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{self.name}: expected a whole number at {key!r}, found {str(value)[:80]}") from error

    def text(self, key: str) -> str:
        """Return a string, or `UNKNOWN`.

        Raises:
            ValueError: the value is not a string.
        """
        return str(self.get(key, str) or UNKNOWN)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`, each with at least `step` and `epoch`.

    The last line is left out if a crash has cut it off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object with a step and an epoch; the message gives its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {str(path)!r}; a run writes metrics.jsonl with its first log line")
    metrics = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not text.endswith("\n"):  # only the last line can lack its end
                break
            raise ValueError(f"line {number} of {path} is not JSON: {text[:60]!r}; delete the line") from error
        if not isinstance(line, dict) or not {"step", "epoch"} <= line.keys():
            raise ValueError(f"line {number} of {path} has no step and epoch: {text[:60]!r}; delete the line")
        metrics.append(line)
    return metrics


def strip_private(value: Any) -> Any:
    """Return JSON-like content without tokens and without the locations of local files.

    Absolute paths, paths that leave the folder and addresses (s3://, file://, https://) are replaced by their last
    part. Addresses of the Census (census://) and of the Hub (hf://) are public and stay.

    Example:
        >>> strip_private({"paths": ["/home/me/cells.h5ad"], "hub_token": "hf_x", "genes": 1200})
        {'paths': ['cells.h5ad'], 'genes': 1200}
    """
    if isinstance(value, dict):
        return {strip_private(key): strip_private(item) for key, item in value.items() if key not in _SECRETS}
    if isinstance(value, list):
        return [strip_private(item) for item in value]
    if not isinstance(value, str) or value.startswith(("census://", "hf://")):
        return value
    if re.match(r"[A-Za-z]:[\\/]|\\\\", value):
        return PureWindowsPath(value).name
    return PurePosixPath(value).name if re.match(r"[/~]|\.\./|[A-Za-z0-9+]+://", value) else value
