"""Bin edges and tie ranges equal scGPT's, and random ties are uniform on its ranges."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from scgpt_hf.tokens.binning_scgpt import Ties, bin_ranges, quantile_edges
from scgpt_hf.tokens.randomness_scgpt import Int64Array
from tests.support.binning import bin_cells

Fixture = tuple[dict[str, np.ndarray], dict[str, list[object]]]


@pytest.fixture(scope="module")
def fixture(fixtures: Path) -> Fixture:
    folder = fixtures / "binning"
    return load_file(folder / "binning.safetensors"), json.loads((folder / "binning.json").read_text())


def _bins_of_rows(rows: np.ndarray, n_bins: int, ties: Ties, seed: int = 0) -> Int64Array:
    """Bin all rows in one call; genes that are not expressed get 0."""
    return bin_cells(csr_matrix(rows), n_bins=n_bins, ties=ties, seed=seed).toarray().astype(np.int64)


def test_edges_equal_the_originals_to_the_last_digit(fixture: Fixture) -> None:
    tensors, about = fixture
    for n_bins in about["n_bins"]:
        for name, row, edges in zip(about["row_names"], tensors["rows"], tensors[f"edges_{n_bins}"], strict=True):
            if (row > 0).any():
                np.testing.assert_array_equal(quantile_edges(row[row > 0], n_bins), edges, err_msg=str(name))


def test_tie_ranges_equal_the_originals_on_every_row(fixture: Fixture) -> None:
    tensors, about = fixture
    for n_bins in about["n_bins"]:
        for i, row in enumerate(tensors["rows"]):
            if not (row > 0).any():
                continue
            lowest, highest = bin_ranges(row[row > 0], n_bins)
            np.testing.assert_array_equal(lowest, tensors[f"lo_{n_bins}"][i][row > 0])
            np.testing.assert_array_equal(highest, tensors[f"hi_{n_bins}"][i][row > 0])


def test_one_sided_and_fixed_ties_are_the_ends_and_the_middle_of_the_range(fixture: Fixture) -> None:
    tensors, about = fixture
    for n_bins in about["n_bins"]:
        low, high = tensors[f"lo_{n_bins}"], tensors[f"hi_{n_bins}"]
        np.testing.assert_array_equal(_bins_of_rows(tensors["rows"], n_bins, "upper"), tensors[f"side_one_{n_bins}"])
        np.testing.assert_array_equal(_bins_of_rows(tensors["rows"], n_bins, "lower"), low)
        np.testing.assert_array_equal(_bins_of_rows(tensors["rows"], n_bins, "midpoint"), (low + high) // 2)


def test_random_ties_are_uniform_on_the_originals_range(fixture: Fixture) -> None:
    tensors, about = fixture
    for n_bins in about["n_bins"]:
        low, high = tensors[f"lo_{n_bins}"], tensors[f"hi_{n_bins}"]
        draws = np.stack([_bins_of_rows(tensors["rows"], n_bins, "random", seed) for seed in range(200)])
        assert (draws >= low).all()
        assert (draws <= high).all()
        tied = high > low
        position = ((draws - low) / np.maximum(high - low, 1))[:, tied]
        assert abs(position.mean() - 0.5) < 0.008
        width = (high - low)[tied]
        spread = ((width + 1.0) ** 2 - 1) / 12 / width**2  # variance of a uniform draw from width + 1 places in [0, 1]
        assert abs(position.var(0).mean() / spread.mean() - 1) < 0.03
