"""Reading a screen: normalization, conditions, batches, and clear errors for input that cannot be used."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from anndata import AnnData

from scgpt_hf.perturbation.cells import ScreenColumns, read_screen


def test_values_are_log1p_of_scaled_counts(screen: AnnData) -> None:
    counts = screen.X.toarray()
    found = read_screen(screen, ScreenColumns(total_key="total"))
    expected = np.log1p(counts * 1e4 / screen.obs["total"].to_numpy()[:, None])
    np.testing.assert_allclose(found.values.toarray(), expected, rtol=1e-5)
    plain = read_screen(screen, ScreenColumns())
    assert plain.target_sum == np.median(counts.sum(1))


def test_conditions_do_not_depend_on_the_order_of_genes(screen: AnnData) -> None:
    found = read_screen(screen, ScreenColumns(batch_key="replicate"))
    assert "GENE0+GENE1" in found.conditions
    assert len(found.items) == 8
    assert set(found.batches) == {"rep0", "rep1"}


def test_cells_without_a_condition_are_left_out(screen: AnnData) -> None:
    screen.obs["condition"] = screen.obs["condition"].where(np.arange(screen.n_obs) >= 5)
    assert len(read_screen(screen, ScreenColumns()).cell_ids) == screen.n_obs - 5


def test_one_replicate_is_enough(make_screen: Callable[..., AnnData]) -> None:
    found = read_screen(make_screen(replicates=1), ScreenColumns(batch_key="replicate"))
    assert set(found.batches) == {"rep0"}


@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        (
            lambda a: a[a.obs["condition"] != "ctrl"].copy(),
            {},
            r"no cell is a control: obs\['condition'\] has no 'ctrl'",
        ),
        (lambda a: a[a.obs["condition"] == "ctrl"].copy(), {}, "all cells are controls"),
        (lambda a: a, {"control": "NT"}, "has no 'NT'"),
        (lambda a: a, {"condition_key": "perturbation"}, "no column 'perturbation'"),
        (lambda a: a, {"batch_key": "well"}, "no column 'well'"),
        (
            lambda a: a[(a.obs["condition"] != "ctrl") | (a.obs["replicate"] == "rep0")].copy(),
            {"batch_key": "replicate"},
            "1 of the 2 batches in replicate have perturbed cells .*'rep1'",
        ),
        (lambda a: normalized(a), {}, "raw counts"),
        (lambda a: renamed(a, "GENE0+GENE0"), {}, "targets GENE0 twice"),
        (lambda a: with_total(a), {"total_key": "total"}, "is not the total of 1 cells"),
    ],
)
def test_input_that_cannot_be_used_raises(
    screen: AnnData, change: Callable[[AnnData], AnnData], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_screen(change(screen), ScreenColumns(**columns))


def normalized(adata: AnnData) -> AnnData:
    adata.X = adata.X.log1p()
    return adata


def renamed(adata: AnnData, name: str) -> AnnData:
    adata.obs.loc[adata.obs_names[-1], "condition"] = name
    return adata


def with_total(adata: AnnData) -> AnnData:
    adata.obs.loc[adata.obs_names[3], "total"] = 1
    return adata
