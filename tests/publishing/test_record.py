"""Reading a run's own record: dotted keys, errors that name file and key, and nothing of this machine in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scgpt_hf.publishing.record import UNKNOWN, Record, portable


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A record with a value of each kind."""
    content = {"steps": 1200, "best": {"eval_loss": 2.5, "name": "x"}, "precise": True, "none": None}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    return Record(tmp_path / "summary.json")


def test_values_are_found_by_dotted_keys(record: Record) -> None:
    assert record.get("best.eval_loss", float) == 2.5
    assert record.number("steps") == "1,200"
    assert record.number("best.eval_loss", ".2f") == "2.50"
    assert record.text("best.name") == "x"


def test_what_is_not_there_is_none_or_said(record: Record) -> None:
    assert record.get("worst.eval_loss", float) is None
    assert record.get("none", dict) is None
    assert record.number("epochs") == record.text("best.device") == UNKNOWN


def test_a_file_that_is_not_there_records_nothing(tmp_path: Path) -> None:
    assert Record(tmp_path / "settings.yaml").content == {}


@pytest.mark.parametrize(
    ("key", "kind", "expected"),
    [
        ("steps", str, "summary.json: expected str at 'steps', found '1200'"),
        ("precise", int, "expected int at 'precise', found 'True'"),
        ("steps.of", int, "expected dict at 'steps', found '1200'"),
        ("best.name", (int, float), "expected int or float at 'best.name', found 'x'"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_file_and_key(record: Record, key: str, kind: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        record.get(key, kind)


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"a": '), ("a.yaml", "a: [1"), ("b.json", "\ufffe")])
def test_a_malformed_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is malformed"):
        Record(tmp_path / name)


def test_a_file_without_keys_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"expected keys and values in a\.json, found list"):
        Record(tmp_path / "a.json")


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
def test_portable_keeps_names_and_drops_places(value: Any, expected: Any) -> None:
    assert portable(value) == expected


plain = st.text(alphabet="ab XY01=.'", max_size=8)


@given(st.lists(st.text(alphabet="abc01_-", min_size=1), min_size=1), st.sampled_from(["/", "~/", "../", "s3://"]))
def test_of_a_place_only_the_last_part_stays(parts: list[str], root: str) -> None:
    assert portable({"paths": [root + "/".join(parts)]}) == {"paths": [parts[-1]]}


@given(st.recursive(plain | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(plain, inner)))
def test_what_is_no_place_stays_as_it_is(content: Any) -> None:
    assert portable(content) == content
