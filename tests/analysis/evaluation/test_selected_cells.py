"""The cells that an evaluation uses: labelled cells, stratified samples of large data, and errors."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scgpt_hf.analysis.evaluation.selected_cells import select_cells

pytestmark = pytest.mark.usefixtures("text_type")


def some_cells(labels: list[str | None], **columns: list[str | None]) -> AnnData:
    """Cells with these labels, batches x, y, x, … and a random embedding X."""
    obs = {"label": labels, "batch": np.resize(["x", "y"], len(labels)), **columns}
    adata = AnnData(obs=pd.DataFrame(obs, index=np.arange(len(labels)).astype(str), dtype=object))
    adata.obsm["X"] = np.random.default_rng(0).normal(size=(len(labels), 2)).astype(np.float32)
    return adata


def test_cells_without_a_label_and_single_cells_are_left_out_and_counted() -> None:
    adata = some_cells(["T", "unknown", "B", None, "T", "", "B", "single", "none"])
    cells = select_cells(adata, ["X"], "label", "batch", unlabeled_categories=["unknown", "none"])
    assert cells.rows.tolist() == [0, 2, 4, 6]
    assert cells.labels.tolist() == ["T", "B", "T", "B"]
    assert cells.batches.tolist() == ["x", "x", "x", "x"]
    np.testing.assert_array_equal(cells.embeddings["X"], adata.obsm["X"][cells.rows])
    assert cells.left_out == {"without a label": 4, "the only cell of their label": 1}


@pytest.mark.parametrize(
    ("adata", "keys", "message"),
    [
        (some_cells([]), (["X"], "label", "batch"), "the AnnData has no cells"),
        (some_cells(["T", "T"]), (["X_pca"], "label", "batch"), r"obsm has no 'X_pca'; its keys are \['X'\]"),
        (some_cells(["T", "T"]), (["X"], "type", "batch"), "obs has no column 'type'"),
        (some_cells(["T", "T"], donor=["a", None]), (["X"], "label", "donor"), "1 of 2 cells have no value in 'donor'"),
        (some_cells(["T", "B"]), (["X"], "label", "batch"), "no label in 'label' has two cells: 2 of 2 cells"),
    ],
)
def test_cells_that_cannot_be_evaluated_raise(adata: AnnData, keys: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_cells(adata, *keys)


def test_an_embedding_that_is_not_finite_raises() -> None:
    adata = some_cells(["T"] * 4)
    adata.obsm["X"][1, 0] = np.nan
    with pytest.raises(ValueError, match=r"obsm\['X'\]: 1 of 4 cells have NaN or infinity"):
        select_cells(adata, ["X"], "label", "batch")


def test_a_sample_gives_each_label_of_each_batch_its_share() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(["common", "some", "rare"], 120_000, p=[0.8, 0.1999, 0.0001])
    batches = rng.choice(["x", "y"], 120_000, p=[0.7, 0.3])
    adata = some_cells(labels.tolist(), batch=batches.tolist())
    cells = select_cells(adata, ["X"], "label", "batch")
    assert len(cells.rows) == 50_000
    assert cells.left_out == {"beyond a sample of 50,000": 70_000}
    assert (cells.embeddings["X"] == adata.obsm["X"][cells.rows]).all()
    assert (cells.labels == "rare").sum() == (labels == "rare").sum()
    for label, batch in (("common", "x"), ("common", "y"), ("some", "x"), ("some", "y")):
        share = ((labels == label) & (batches == batch)).mean()
        assert ((cells.labels == label) & (cells.batches == batch)).mean() == pytest.approx(share, rel=0.01)
