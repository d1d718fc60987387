"""Tests of reading the files of a run, and of removing private values from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scgpt_hf.publishing.record import UNKNOWN, RunRecord, read_metrics, strip_private


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """Return a record with a value of each kind."""
    content = {"steps": 1200, "best": {"eval_loss": 2.5, "name": "x"}, "precise": True, "none": None}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    return RunRecord.read(tmp_path / "summary.json")


def test_values_are_looked_up_by_dotted_keys(record: RunRecord) -> None:
    assert record.get("best.eval_loss", float) == 2.5
    assert record.number("steps") == "1,200"
    assert record.number("best.eval_loss", ".2f") == "2.50"
    assert record.text("best.name") == "x"


def test_missing_keys_give_none_or_unknown(record: RunRecord) -> None:
    assert record.get("worst.eval_loss", float) is None
    assert record.get("none", dict) is None
    assert record.number("epochs") == record.text("best.device") == UNKNOWN


def test_missing_file_gives_an_empty_record(tmp_path: Path) -> None:
    assert RunRecord.read(tmp_path / "settings.yaml").content == {}


@pytest.mark.parametrize(
    ("key", "kind", "expected"),
    [
        ("steps", str, "summary.json: expected str at 'steps', found '1200'"),  # this case owns the text
        ("precise", int, "'precise'"),
        ("steps.of", int, "expected dict at 'steps'"),
        ("best.name", (int, float), "int or float at 'best.name'"),
    ],
)
def test_value_of_another_type_raises_with_file_and_key(record: RunRecord, key: str, kind: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        record.get(key, kind)


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"a": '), ("a.yaml", "a: [1"), ("b.json", "\ufffe")])
def test_malformed_file_raises_with_its_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is malformed"):
        RunRecord.read(tmp_path / name)


def test_file_that_is_not_a_mapping_raises_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"a\.json, found list"):
        RunRecord.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/someone/cells.h5ad", "cells.h5ad"),
        ("~/cells.h5ad", "cells.h5ad"),
        ("../../cells", "cells"),
        (r"C:\data\cells.h5ad", "cells.h5ad"),
        (r"\\server\share\cells.h5ad", "cells.h5ad"),
        ("s3://bucket/cells.h5ad", "cells.h5ad"),
        ("https://user:word@host/cells.h5ad", "cells.h5ad"),
        ("file:///data/cells.h5ad", "cells.h5ad"),
        ("census://2025-11-08/homo_sapiens", "census://2025-11-08/homo_sapiens"),
        ("runs/demo", "runs/demo"),
        ("tissue_general == 'blood'", "tissue_general == 'blood'"),
        ({"hub_token": "hf_x", "/a/b": ["/c/d"], "n": 1}, {"b": ["d"], "n": 1}),
    ],
)
def test_strip_private_keeps_names_and_drops_locations(value: Any, expected: Any) -> None:
    assert strip_private(value) == expected


plain = st.text(alphabet="ab XY01=.'", max_size=8)


@given(st.lists(st.text(alphabet="abc01_-", min_size=1), min_size=1), st.sampled_from(["/", "~/", "../", "s3://"]))
def test_strip_private_keeps_the_last_part_of_a_location(parts: list[str], root: str) -> None:
    assert strip_private({"paths": [root + "/".join(parts)]}) == {"paths": [parts[-1]]}


@given(st.recursive(plain | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(plain, inner)))
def test_strip_private_leaves_other_values_unchanged(content: Any) -> None:
    assert strip_private(content) == content


LINES = [{"step": 1, "epoch": 0.1, "loss": 3.0}, {"step": 2, "epoch": 0.2, "eval_loss": 2.0}]


def test_read_metrics_returns_the_logged_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert read_metrics(tmp_path / "metrics.jsonl") == LINES


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"step": 1, "epoch": 0.1}\n{"step": 2, "ep\n', 2),
        *((f'{{"step": 1, "epoch": 0.1}}\n{line}\n', 2) for line in ("junk", "{}", "3", "[" * 100_000)),
        ('{"step": 1}\n', 1),
        ("[1, 2]\n", 1),
    ],
)
def test_malformed_metrics_raise_with_the_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"line {line} of "):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_last_line_that_a_crash_has_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1}\n{"step": 2, "ep')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "epoch": 0.1}]


def test_missing_metrics_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics"):
        read_metrics(tmp_path / "metrics.jsonl")
