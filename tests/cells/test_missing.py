"""Test the rule for missing values: which values are missing, and that every source and every use follows it."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scgpt_hf import open_source, write_cache
from scgpt_hf.analysis.evaluation.selected_cells import select_cells
from scgpt_hf.cells.missing import fill_missing, has_label, has_value, number_texts
from scgpt_hf.cells.selection.filters import cells_with_value
from scgpt_hf.cells.selection.splits import find_donors
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.source import CellSource
from scgpt_hf.training.finetuning.labels import select_labelled
from scgpt_hf.training.selection import composition_of, select_cells_and_genes
from scgpt_hf.training.settings import DataSettings

pytestmark = pytest.mark.usefixtures("text_type")

MISSING: dict[str, Any] = {
    "object": pd.Series(["a", None, np.nan, pd.NA, "b", "", " ", "nan", "<NA>", "None", "NaT"], dtype=object),
    "string": pd.Series(["a", None, None, None, "b", "", " ", "nan", "<NA>", "None", "NaT"], dtype="string"),
    "str of pandas 3": pd.Series(
        ["a", None, None, None, "b", "", " ", "nan", "<NA>", "None", "NaT"], dtype=pd.StringDtype(na_value=np.nan)
    ),
    "category": pd.Series(pd.Categorical(["a", None, None, None, "b", "", " ", "nan", "<NA>", "None", "NaT"])),
}
NUMBERS: dict[str, Any] = {
    "float": pd.Series([1.0, np.nan]),
    "Int64": pd.Series([1, None], dtype="Int64"),
    "boolean": pd.Series([True, None], dtype="boolean"),
    "Float64": pd.Series([1.0, None], dtype="Float64"),
    "datetime": pd.Series(pd.to_datetime(["2020-01-01", None])),
    "category": pd.Series(pd.Categorical([1, None])),
}


@pytest.mark.parametrize("kind", MISSING)
def test_nulls_and_the_texts_of_nulls_are_missing_in_every_type(kind: str) -> None:
    column = MISSING[kind]
    assert np.flatnonzero(has_value(column)).tolist() == [0, 4]
    assert fill_missing(column).tolist() == ["a", "unknown", "unknown", "unknown", "b", *["unknown"] * 6]


@pytest.mark.parametrize("kind", MISSING)
def test_texts_are_numbered_in_their_order_in_every_type(kind: str) -> None:
    numbers, texts = number_texts(MISSING[kind].iloc[::-1])
    assert texts == ["a", "b"]
    assert numbers.tolist() == [*[-1] * 6, 1, -1, -1, -1, 0]


@pytest.mark.parametrize("kind", NUMBERS)
def test_null_numbers_are_missing(kind: str) -> None:
    assert has_value(NUMBERS[kind]).tolist() == [True, False]


@pytest.mark.parametrize("kind", ["float64", "float32", "Int64", "Float64", "category", "object"])
def test_whole_numbers_have_no_decimals_as_text(kind: str) -> None:
    column = pd.Series([10, None, -2], index=[7, 3, 5]).astype(kind)
    assert fill_missing(column).to_dict() == {7: "10", 3: "unknown", 5: "-2"}
    assert has_label(column, ["10"]).tolist() == [False, False, True]
    assert fill_missing(pd.Series([0.5, 1.0, np.inf])).tolist() == ["0.5", "1", "inf"]


def test_unknown_is_a_value_but_never_a_label() -> None:
    column = pd.Series(["T cell", "unknown", None, "doublet", "nan"], index=[7, 3, 5, 1, 2])
    assert has_value(column).tolist() == [True, True, False, True, False]
    assert has_label(column).tolist() == [True, False, False, True, False]
    assert has_label(column, ["doublet"]).tolist() == [True, False, False, False, False]
    assert not len(has_value(column[:0]))


def cells_with_missing_values(small_cells: list[AnnData]) -> AnnData:
    """Cells of the first data set, with columns that miss every third or fourth value."""
    cells = small_cells[0].copy()
    third = np.arange(cells.n_obs) % 3 == 0
    types = cells.obs["cell_type"].astype(object)
    cells.obs["label"] = types.where(~third, None).astype("category")
    cells.obs["text"] = types.where(~third, "nan").astype("category")
    cells.obs["string"] = pd.array(types.where(~third, None).tolist(), dtype="string")
    cells.obs["batch"] = pd.Categorical(np.where(third, None, np.where(np.arange(cells.n_obs) % 2, "x", "y")))
    cells.obs["lane"] = pd.array(np.arange(cells.n_obs) % 4, dtype="Int64")
    cells.obs.loc[third, "lane"] = pd.NA
    cells.obs["cell_type"] = types.where(~third, None)
    return cells


@pytest.fixture(params=["anndata", "h5ad", "soma", "cache"])
def source(request: pytest.FixtureRequest, small_cells: list[AnnData], tmp_path: Path) -> CellSource:
    """The same cells from every kind of source."""
    cells = cells_with_missing_values(small_cells)
    if request.param == "anndata":
        return open_source(cells, primary_only=False)
    with anndata.settings.override(allow_write_nullable_strings=True):
        cells.write_h5ad(tmp_path / "cells.h5ad")
    if request.param == "h5ad":
        return open_source(tmp_path / "cells.h5ad", primary_only=False)
    kept = ["label", "text", "string", "batch", "lane"]
    build_census([tmp_path / "cells.h5ad"], tmp_path / "soma", keep_obs=kept)
    census = open_source(tmp_path / "soma", primary_only=False)
    if request.param == "soma":
        return census
    write_cache(census, tmp_path / "cache", columns=["donor_id", "cell_type", *kept])
    return open_source(tmp_path / "cache", primary_only=False)


def test_missing_values_are_missing_in_every_source_and_never_labels(source: CellSource) -> None:
    columns = ["label", "text", "string", "batch", "lane"]
    obs = source.obs([*columns, "cell_type"])
    third = np.arange(len(obs)) % 3 == 0
    read = source.read(obs.index.to_numpy(), columns).obs
    for column in columns:
        assert has_value(obs[column]).tolist() == (~third).tolist(), column
        assert has_value(read[column]).tolist() == (~third).tolist(), column
    types = ["B cell", "NK cell", "T cell", "monocyte"]
    # Integers with gaps are read as floats from some sources. Their text is the same from all.
    for column, names in {
        **dict.fromkeys(("label", "text", "string", "cell_type"), types),
        "lane": list("0123"),
    }.items():
        options = {"donor_key": None, "validation_fraction": 0.3, "label_fraction": 1.0, "min_cells": 2, "seed": 0}
        labelled = select_labelled(obs[[column]], column, ignore_labels=[], **options)
        assert labelled.class_names == names, column
        assert labelled.left_out["unlabelled"] == third.sum()
    assert len(cells_with_value(obs, "batch")) == (~third).sum()
    with pytest.raises(ValueError, match=f"{third.sum()} of {len(obs)} cells have no text"):
        find_donors(obs, "text")


def test_a_filter_never_selects_missing_values_of_kept_columns(small_cells: list[AnnData], tmp_path: Path) -> None:
    with anndata.settings.override(allow_write_nullable_strings=True):
        cells_with_missing_values(small_cells).write_h5ad(tmp_path / "cells.h5ad")
    build_census([tmp_path / "cells.h5ad"], tmp_path / "soma", keep_obs=["label", "string", "lane"])
    for text in ("label != 'T cell'", "string != 'T cell'", "lane != 0", "label == None", "string == None"):
        filtered = [
            open_source(tmp_path / name, obs_filter=text, primary_only=False).obs().index.tolist()
            for name in ("cells.h5ad", "soma")
        ]
        assert filtered[0] == filtered[1], text


def test_cells_without_a_batch_are_dropped_before_pretraining(small_cells: list[AnnData]) -> None:
    source = open_source(cells_with_missing_values(small_cells), primary_only=False)
    data = DataSettings(data=["cells.h5ad"], batch_key="batch", gene_selection="all", min_genes=0)
    selection = select_cells_and_genes(source, data, seed=0)
    assert selection.domains == ["x", "y"]
    assert all(has_value(source.obs(["batch"]).loc[ids, "batch"]).all() for ids in selection.parts.values())


def test_missing_values_are_counted_as_unknown(small_cells: list[AnnData]) -> None:
    cells = small_cells[0].copy()
    cells.obs["disease"] = cells.obs["disease"].astype(object).where(np.arange(cells.n_obs) > 1, None)
    counted = composition_of(open_source(cells, primary_only=False), {"train": np.arange(160)})["disease"]
    assert counted["unknown"] == 2
    assert sum(counted.values()) == 160


def test_an_evaluation_leaves_out_missing_labels_and_refuses_missing_batches() -> None:
    adata = AnnData(np.zeros((6, 1), np.float32), obsm={"X": np.eye(6, dtype=np.float32)})
    adata.obs["label"] = ["a", "a", "nan", "nan", "unknown", "unknown"]
    adata.obs["batch"] = ["x", "x", "x", "y", "y", "<NA>"]
    with pytest.raises(ValueError, match="1 of 6 cells have no value in 'batch'"):
        select_cells(adata, ["X"], "label", "batch")
    adata.obs["batch"] = "x"
    assert select_cells(adata, ["X"], "label", "batch", unlabeled_categories=[]).labels.tolist() == ["a", "a"]


def test_a_dataset_with_a_missing_id_keeps_that_of_its_other_cells(small_cells: list[AnnData], tmp_path: Path) -> None:
    cells = small_cells[0].copy()
    for name, ids in {"some": cells.obs["dataset_id"].where(np.arange(160) > 1, None), "none": None}.items():
        cells.obs["dataset_id"] = pd.Series(ids, cells.obs_names, dtype="category")
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    build_census([tmp_path / "some.h5ad", tmp_path / "none.h5ad"], tmp_path / "soma")
    found = open_source(tmp_path / "soma", primary_only=False).obs(["dataset_id"])["dataset_id"]
    assert sorted(set(found)) == ["first", "none"]
