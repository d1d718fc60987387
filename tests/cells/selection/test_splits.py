"""Splitting by donor: properties of every split, the manifest written and loaded, and every error."""

import doctest
import json
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.selection import splits
from scgpt_hf.cells.selection.splits import load_split, save_split, split_cells, split_within

FRACTIONS = {"train": 0.97, "validation": 0.03}


def make_obs(n_cells_of_donor: list[int], shuffled: int | None = None) -> pd.DataFrame:
    """The obs of donors d0, d1, … with these numbers of cells; cell ids ascend with gaps."""
    donors = np.repeat([f"d{number}" for number in range(len(n_cells_of_donor))], n_cells_of_donor)
    if shuffled is not None:
        np.random.default_rng(shuffled).shuffle(donors)
    index = pd.Index(np.arange(len(donors)) * 3 + 7, name="cell_id", dtype=np.int64)
    return pd.DataFrame({"donor_id": pd.Categorical(donors)}, index=index)


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(splits).failed == 0


donor_sizes = st.lists(st.integers(1, 60), min_size=3, max_size=25)
shares = st.sampled_from([(0.97, 0.03), (0.5, 0.5), (0.8, 0.1, 0.1), (0.1, 0.9), (0.6, 0.4, 0.0)])
law = settings(deadline=None, max_examples=30)


@law
@given(sizes=donor_sizes, shares=shares, seed=st.integers(0, 2**32), order=st.integers(0, 9))
def test_every_cell_and_every_donor_is_in_exactly_one_part(sizes, shares, seed, order):
    obs = make_obs(sizes, order)
    fractions = dict(zip("abc", shares, strict=False))
    parts = split_cells(obs, fractions, seed=seed)
    assert list(parts) == list(fractions)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), obs.index)
    donors = {name: set(obs.loc[ids, "donor_id"]) for name, ids in parts.items()}
    assert all(not donors[one] & donors[other] for one, other in combinations(donors, 2))
    for name, ids in parts.items():
        assert ids.dtype == np.int64
        assert (np.diff(ids) > 0).all()
        assert bool(len(ids)) == (fractions[name] > 0)
    again = split_cells(obs.copy(), fractions, seed=seed)
    assert all((again[name] == ids).all() for name, ids in parts.items())


@law
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=7), share=st.floats(0.05, 0.5))
def test_few_donors_are_placed_as_close_to_the_fraction_as_possible(sizes, share):
    obs = make_obs(sizes)
    parts = split_cells(obs, {"train": 1 - share, "validation": share}, seed=0)
    target = share * sum(sizes)
    choices = [choice for choice in product([0, 1], repeat=len(sizes)) if 0 < sum(choice) < len(sizes)]
    best = min(abs(np.dot(choice, sizes) - target) for choice in choices)
    assert abs(len(parts["validation"]) - target) < best + 1


def test_many_donors_are_split_by_the_fractions():
    sizes = np.random.default_rng(0).geometric(1 / 3000, 100).tolist()
    parts = split_cells(make_obs(sizes), FRACTIONS, seed=0)
    assert abs(len(parts["validation"]) / sum(sizes) - 0.03) < 0.001


def test_seeds_hold_out_different_donors():
    obs = make_obs([10] * 40)
    held_out = {tuple(split_cells(obs, {"a": 0.9, "b": 0.1}, seed=seed)["b"]) for seed in range(10)}
    assert len(held_out) == 10


@pytest.mark.parametrize("big", [0, 3])
def test_a_donor_larger_than_the_validation_part_trains(big):
    sizes = [20, 30, 25, 28]
    sizes[big] = 5000
    for seed in range(10):
        parts = split_cells(make_obs(sizes), FRACTIONS, seed=seed)
        assert len(parts["validation"]) == sum(sizes) - 5000  # 1.5 % of the cells: closer than with the large donor


def test_when_all_donors_are_large_the_smallest_validates():
    parts = split_cells(make_obs([900, 700, 800]), FRACTIONS, seed=3)
    assert len(parts["validation"]) == 700


def test_a_donor_in_several_datasets_is_one_donor():
    obs = make_obs([5, 5, 5]).assign(dataset_id=["x", "y", "z"] * 5)
    parts = split_cells(obs, {"a": 0.5, "b": 0.5}, seed=0)
    assert set(obs.loc[parts["a"], "donor_id"]).isdisjoint(obs.loc[parts["b"], "donor_id"])


def test_single_cells_are_split_without_a_donor_key():
    obs = make_obs([150_000, 150_000])
    parts = split_cells(obs, FRACTIONS, seed=0, donor_key=None)
    assert abs(len(parts["validation"]) - 9000) <= 1
    assert obs.loc[parts["validation"], "donor_id"].nunique() == 2


@pytest.mark.parametrize(
    ("obs", "settings", "message"),
    [
        (make_obs([9]), {}, r"found 1 donor_id in 9 cells, expected at least 2: one for each of \['train', 'valid"),
        (make_obs([]), {}, "found no cells to take donors from"),
        (make_obs([9]), {}, "use more cells .*--obs_filter.*--max_cells.*--donor_key"),
        (make_obs([1]), {"donor_key": None}, "found 1 cells in 1 cells, expected at least 2"),
        (make_obs([5, 5]), {"donor_key": "patient"}, r"no column 'patient' .* columns are \['donor_id'\]"),
        (
            make_obs([5, 5]).assign(donor_id=[None, None, *"xyxyxyxy"]),
            {},
            "2 of 10 cells have no donor_id; choose a column .*--donor_key.*--obs_filter",
        ),
        (make_obs([5, 5]), {"fractions": {"a": 0.5, "b": 0.6}}, r"add up to 1, found \{'a': 0.5, 'b': 0.6\}"),
        (make_obs([5, 5]), {"fractions": {"a": 1.5, "b": -0.5}}, r"in \[0, 1\]"),
        (make_obs([5, 5]), {"fractions": {}}, "add up to 1"),
    ],
)
def test_split_cells_rejects_invalid_arguments(obs, settings, message):
    with pytest.raises(ValueError, match=message):
        split_cells(obs, **{"fractions": FRACTIONS, "seed": 0, **settings})


@law
@given(sizes=donor_sizes, order=st.integers(0, 9), donor_key=st.sampled_from(["donor_id", None]))
def test_a_manifest_is_loaded_as_it_was_saved(tmp_path_factory, sizes, order, donor_key):
    obs, path = make_obs(sizes, order), tmp_path_factory.mktemp("split") / "split.json"
    obs.index = pd.Index(np.cumsum(np.random.default_rng(order).integers(1, 3, len(obs))), name="cell_id")
    parts = split_cells(obs, {"train": 0.7, "validation": 0.3, "test": 0.0}, seed=order, donor_key=donor_key)
    source = {"kind": "census", "census_version": "2025-11-08", "gene_hash": "0123"}
    save_split(path, parts, obs, seed=order, source=source, donor_key=donor_key)
    split = load_split(path)
    assert (split.donor_key, split.seed, split.source) == (donor_key, order, source)
    assert list(split.parts) == ["train", "validation", "test"]
    for name, ids in parts.items():
        assert split.parts[name].dtype == np.int64
        np.testing.assert_array_equal(split.parts[name], ids)
        assert split.donors[name] == ([] if donor_key is None else sorted(set(obs.loc[ids, "donor_id"])))
    assert [file.name for file in path.parent.iterdir()] == ["split.json"]


def test_a_manifest_is_small_and_readable_as_json(tmp_path):
    index = pd.Index(np.arange(1_000_000), name="cell_id")
    obs = pd.DataFrame({"donor_id": pd.Categorical.from_codes(np.arange(1_000_000) // 10_000, range(100))}, index=index)
    parts = split_cells(obs, FRACTIONS, seed=0)
    save_split(tmp_path / "split.json", parts, obs, seed=0, source={})
    assert (tmp_path / "split.json").stat().st_size < 3000
    manifest = json.loads((tmp_path / "split.json").read_text())
    assert manifest["parts"]["validation"]["n_cells"] == 30_000
    assert len(manifest["parts"]["validation"]["donors"]) == 3


def test_a_failed_write_keeps_the_old_manifest_and_leaves_no_temporary_file(tmp_path):
    obs, path = make_obs([5, 5]), tmp_path / "split.json"
    parts = split_cells(obs, {"a": 0.5, "b": 0.5}, seed=0)
    save_split(path, parts, obs, seed=0, source={"of": "old"})
    with pytest.raises(TypeError):
        save_split(path, parts, obs, seed=0, source={"of": object()})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save_split(tmp_path / "folder", parts, obs, seed=0, source={})
    assert load_split(path).source == {"of": "old"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "split.json"]


def write_manifest(tmp_path, change):
    """Write a valid manifest after applying a change to it, and return its path."""
    manifest = {
        "seed": 0,
        "donor_key": "donor_id",
        "source": {},
        "parts": {
            "train": {"n_cells": 3, "donors": ["x"], "cell_ranges": [[0, 2], [5, 6]]},
            "validation": {"n_cells": 2, "donors": ["y"], "cell_ranges": [[2, 4]]},
        },
    }
    change(manifest)
    (tmp_path / "split.json").write_text(json.dumps(manifest))
    return tmp_path / "split.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("parts"), "split.json: expected 'parts' as dict, found 'nothing'"),
        (lambda m: m.update(parts=[1]), r"expected 'parts' as dict, found '\[1\]'"),
        (lambda m: m.update(seed="x"), "expected 'seed' as int, found 'x'"),
        (lambda m: m.update(donor_key=3), r"expected 'donor_key' as str \| None, found '3'"),
        (lambda m: m.pop("source"), "expected 'source' as dict"),
        (lambda m: m["parts"].update(train=7), "part 'train': expected 'n_cells' as int, found '7'"),
        (lambda m: m["parts"]["train"].pop("donors"), "split.json, part 'train': expected 'donors' as list"),
        (
            lambda m: m["parts"]["train"].update(cell_ranges=[[5, 2]]),
            r"expected 'cell_ranges' of ascending .* found \[\[5, 2\]\]",
        ),
        (lambda m: m["parts"]["train"].update(cell_ranges=[[0, 2, 3]]), "expected 'cell_ranges' of ascending"),
        (lambda m: m["parts"]["train"].update(cell_ranges=[[0, "2"]]), "expected 'cell_ranges' of ascending"),
        (lambda m: m["parts"]["train"].update(cell_ranges=[[5, 6], [0, 2]]), "expected 'cell_ranges' of ascending"),
        (lambda m: m["parts"]["train"].update(cell_ranges=[[0, 2]]), "'cell_ranges' hold 2 cells, but 'n_cells' is 3"),
        (lambda m: m["parts"]["train"].update(donors=["x", "y"]), r"1 donors are both in 'train' and 'valid.*\['y'\]"),
        (lambda m: m["parts"]["train"].update(cell_ranges=[[0, 3]]), "1 cells are both in 'train' and 'validation'"),
    ],
)
def test_an_invalid_manifest_raises_an_error_with_the_key(tmp_path, change, message):
    assert load_split(write_manifest(tmp_path, lambda manifest: None)).parts["train"].tolist() == [0, 1, 5]
    with pytest.raises(ValueError, match=message):
        load_split(write_manifest(tmp_path, change))


def test_a_file_that_is_not_json_or_does_not_exist_raises(tmp_path):
    (tmp_path / "split.json").write_text('{"seed": 0,')
    with pytest.raises(ValueError, match=r"split\.json is not JSON"):
        load_split(tmp_path / "split.json")
    with pytest.raises(FileNotFoundError):
        load_split(tmp_path / "absent.json")


def test_a_group_of_one_cell_is_never_held_out() -> None:
    parts = split_within(pd.Series(["a", "b", "b"], index=[3, 5, 9]), 0.9, seed=0)
    assert 3 in parts["train"]
    assert len(parts["validation"]) == 1
