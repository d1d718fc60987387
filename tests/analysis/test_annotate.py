"""Test the annotation of cells: by a classifier, by a reference, in files, and "unassigned" where both fail."""

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, csr_matrix

from scgpt_hf import (
    ScGPTConfig,
    ScGPTForSequenceClassification,
    ScGPTModel,
    ScGPTProcessor,
    inference,
    predict_cell_types,
    transfer_labels,
)
from scgpt_hf.analysis.annotate_file import annotate_file
from scgpt_hf.analysis.evaluation.selected_cells import select_cells
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "annotate.py"
N_CELLS, GENES, TYPES = 30, [f"ENSG{number:011}" for number in range(12)], ["A/B", "C+", "D"]


def make_cells() -> AnnData:
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, len(GENES))).astype(np.float32)
    counts[:, 0] = 1
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(N_CELLS)])
    return AnnData(counts, obs, pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def processor() -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(GENES)


@pytest.fixture(scope="module")
def config(processor: ScGPTProcessor) -> ScGPTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {"id2label": dict(enumerate(TYPES)), "label2id": {name: index for index, name in enumerate(TYPES)}}
    return ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes, **names)


@pytest.fixture(scope="module")
def classifier(config: ScGPTConfig, processor: ScGPTProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("types") / "best_model"
    torch.manual_seed(0)
    ScGPTForSequenceClassification(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(config: ScGPTConfig, processor: ScGPTProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "best_model"
    torch.manual_seed(0)
    ScGPTModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_types_are_the_most_likely_and_unassigned_below_the_threshold(
    classifier: Path, processor: ScGPTProcessor
) -> None:
    model = ScGPTForSequenceClassification.from_pretrained(classifier).eval()
    midpoint = ScGPTProcessor.from_genes(GENES, ties="midpoint")
    with torch.inference_mode():
        expected = torch.softmax(model(**midpoint(make_cells())).logits, dim=-1).numpy()
    threshold = float(np.median(expected.max(axis=1)))
    adata = make_cells()
    report = predict_cell_types(adata, model, processor, threshold=threshold, batch_size=7, progress=False)
    types, confidence = adata.obs["predicted_cell_type"], adata.obs["predicted_cell_type_confidence"].to_numpy()
    np.testing.assert_allclose(confidence, expected.max(axis=1), atol=1e-6)
    sure = confidence >= threshold
    assert (types[sure] == np.array(TYPES)[expected.argmax(axis=1)][sure]).all()
    assert (types[~sure] == "unassigned").all()
    assert report["unassigned"] == (~sure).sum() > 0
    assert sum(report["types"]["cells"]) == report["cells"] == N_CELLS
    assert report["genes"]["by_id"] == len(GENES)


def test_cells_without_a_known_gene_raise_an_error_or_are_unassigned(classifier: Path) -> None:
    adata = make_cells()
    adata.X[3] = 0
    with pytest.raises(ValueError, match=r"first ids: \[3\]"):
        predict_cell_types(adata, classifier, progress=False)
    assert not list(adata.obs)
    predict_cell_types(adata, classifier, threshold=0, empty="nan", progress=False)
    assert (adata.obs["predicted_cell_type"] == "unassigned").to_numpy().nonzero()[0].tolist() == [3]
    assert np.isnan(adata.obs["predicted_cell_type_confidence"].iloc[3])


def test_models_and_arguments_that_cannot_be_used_for_prediction_raise_an_error(
    classifier: Path, encoder: Path, processor: ScGPTProcessor
) -> None:
    adata = make_cells()
    with pytest.raises(ValueError, match="no trained class_head"):
        predict_cell_types(adata, encoder, progress=False)
    with pytest.raises(ValueError, match="ScGPTModel has no class_head"):
        predict_cell_types(adata, ScGPTModel.from_pretrained(encoder), processor, progress=False)
    with pytest.raises(ValueError, match="needs its processor"):
        predict_cell_types(adata, ScGPTForSequenceClassification.from_pretrained(classifier), progress=False)
    with pytest.raises(ValueError, match="found 2"):
        predict_cell_types(adata, classifier, threshold=2, progress=False)


def test_columns_are_replaced_only_with_overwrite(classifier: Path) -> None:
    adata = make_cells()
    adata.obs["predicted_cell_type_confidence"] = 1.0
    with pytest.raises(ValueError, match="'predicted_cell_type_confidence'"):
        predict_cell_types(adata, classifier, progress=False)
    predict_cell_types(adata, classifier, overwrite=True, progress=False)
    predict_cell_types(adata, classifier, key_added="other", progress=False)


def make_embedded(vectors: Any, types: Any = None) -> AnnData:
    """Make cells with these vectors in obsm, and labels if given."""
    vectors = np.asarray(vectors, np.float32)
    adata = AnnData(np.zeros((len(vectors), 1), np.float32), obsm={"X_scgpt": vectors})
    if types is not None:
        adata.obs["cell_type"] = types
    return adata


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), n_neighbors=st.integers(1, 8), n_types=st.integers(2, 4))
def test_votes_are_weighted_by_inverse_distance(seed: int, n_neighbors: int, n_types: int) -> None:
    rng = np.random.default_rng(seed)
    reference, query = rng.normal(size=(20, 3)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    types = np.array(list("abcd"))[np.arange(20) % n_types]
    adata = make_embedded(query)
    transfer_labels(adata, make_embedded(reference, types), n_neighbors=n_neighbors, threshold=0)
    for cell, vector in enumerate(query):
        distance = np.linalg.norm(reference - vector, axis=1)
        nearest = np.argsort(distance)[:n_neighbors]
        votes = {name: (1 / distance[nearest])[types[nearest] == name].sum() for name in set(types)}
        best = max(votes.values())
        assert votes[adata.obs["predicted_cell_type"].iloc[cell]] == pytest.approx(best, rel=1e-4)
        confidence = adata.obs["predicted_cell_type_confidence"].iloc[cell]
        assert confidence == pytest.approx(best / sum(votes.values()), rel=1e-4)
        assert adata.obs["predicted_cell_type_distance"].iloc[cell] == pytest.approx(distance[nearest].mean(), rel=1e-4)


def test_cells_of_a_type_that_the_reference_lacks_are_far_and_can_be_unassigned() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 2)) + np.repeat([[0, 0], [9, 0]], 30, axis=0)
    reference = make_embedded(vectors, ["T cell"] * 30 + ["B cell"] * 30)
    query = rng.normal(size=(20, 2)) + np.repeat([[0, 0], [0, 30]], 10, axis=0)  # the second half has another type
    adata = make_embedded(query)
    report = transfer_labels(adata, reference, n_neighbors=5)
    assert set(adata.obs["predicted_cell_type"]) <= {"T cell", "B cell", "unassigned"}
    assert report["cells_beyond"] >= 10
    report = transfer_labels(adata, reference, n_neighbors=5, max_distance=5.0, overwrite=True)
    assert (adata.obs["predicted_cell_type"][10:] == "unassigned").all()
    assert (adata.obs["predicted_cell_type"][:10] == "T cell").all()


@pytest.mark.parametrize("form", [csr_matrix, csr_array, pd.DataFrame])
def test_embeddings_may_be_sparse_or_tables(form: Any) -> None:
    reference, query = make_embedded([[0, 1], [0, 2], [9, 0], [8, 0]], list("aabb")), make_embedded([[7, 0], [0, 1]])
    for adata in (reference, query):
        vectors = adata.obsm["X_scgpt"]
        adata.obsm["X_scgpt"] = form(vectors, index=adata.obs_names) if form is pd.DataFrame else form(vectors)
    transfer_labels(query, reference, n_neighbors=2)
    assert query.obs["predicted_cell_type"].tolist() == ["b", "a"]
    cells = select_cells(reference, ["X_scgpt"], "cell_type", "cell_type")
    np.testing.assert_array_equal(cells.embeddings["X_scgpt"], [[0, 1], [0, 2], [9, 0], [8, 0]])


def test_unlabelled_and_unembedded_cells_of_the_reference_do_not_vote() -> None:
    reference = make_embedded(
        [[0.0], [0.1], [0.2], [5.0], [5.1], [0.0]], ["unknown", None, "", "far", "farther", "lost"]
    )
    reference.obsm["X_scgpt"][5] = np.nan
    adata = make_embedded([[0.0], [np.nan]])
    transfer_labels(adata, reference, n_neighbors=1)
    assert adata.obs["predicted_cell_type"].tolist() == ["far", "unassigned"]


def test_a_reference_or_query_that_cannot_be_used_raises_an_error() -> None:
    reference, query = make_embedded(np.eye(4), list("aabb")), make_embedded(np.eye(4))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (reference, {"use_rep": "X_pca", "n_neighbors": 1}, "query .*'X_pca'"),
        (reference, {"labels_key": "absent"}, "reference .*'absent'"),
        (reference, {"n_neighbors": 4}, "more than the 4 neighbors"),
        (make_embedded(np.eye(4), ["unknown"] * 4), {"n_neighbors": 1}, "0 of 4 cells"),
        (make_embedded(np.eye(4), ["B cell", "B cell", "unknown", "B cell"]), {"n_neighbors": 1}, "all 3 .*'B cell'"),
        (make_embedded(np.ones((4, 2)), list("aabb")), {"n_neighbors": 1}, "4 numbers, .* reference 2"),
        (make_embedded(np.ones((0, 4)), []), {"n_neighbors": 1}, "reference has no cells"),
        (reference, {"threshold": -1}, "threshold"),
    ]
    for other, options, message in cases:
        with pytest.raises(ValueError, match=message):
            transfer_labels(query, other, **options)
    query.uns["X_scgpt"], reference.uns["X_scgpt"] = {"model": "one"}, {"model": "other"}
    with pytest.raises(ValueError, match="embedded by one, the reference by other"):
        transfer_labels(query, reference, n_neighbors=1)
    query.uns["X_scgpt"] = {"model": "other"}
    transfer_labels(query, reference, n_neighbors=1)
    with pytest.raises(ValueError, match="already"):
        transfer_labels(query, reference, n_neighbors=1)


def test_a_file_is_annotated_as_in_memory_and_keeps_its_other_contents(classifier: Path, tmp_path: Path) -> None:
    adata = make_cells()
    adata.obs["kept"] = np.arange(N_CELLS)
    adata.uns["kept"] = "yes"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    annotate = partial(predict_cell_types, model=classifier, progress=False)
    annotate_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", annotate)
    annotate(adata)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    pd.testing.assert_frame_equal(found.obs, adata.obs, check_dtype=False, check_index_type=False)
    assert list(found.uns["predicted_cell_type"]["types"]["name"]) == adata.uns["predicted_cell_type"]["types"]["name"]
    assert found.uns["kept"] == "yes"
    np.testing.assert_array_equal(found.X, adata.X)


def test_a_file_with_nullable_text_is_annotated(classifier: Path, tmp_path: Path) -> None:
    adata = make_cells()
    adata.obs["barcode"] = pd.array([None, *map(str, range(1, N_CELLS))], dtype="string")
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "cells.h5ad")
    annotate_file(
        tmp_path / "cells.h5ad", tmp_path / "out.h5ad", partial(predict_cell_types, model=classifier, progress=False)
    )
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert found["barcode"].isna().tolist() == [True] + [False] * (N_CELLS - 1)
    assert "predicted_cell_type" in found


def test_results_that_anndata_cannot_write_are_kept_beside_the_file(classifier: Path, tmp_path: Path) -> None:
    make_cells().write_h5ad(tmp_path / "cells.h5ad")

    def annotate(adata: AnnData) -> dict[str, Any]:
        adata.uns["odd"] = object()
        return predict_cell_types(adata, classifier, threshold=0, progress=False)

    with pytest.raises(OSError, match=r"could not be written: .* are in .*unsaved"):
        annotate_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", annotate)
    (kept,) = tmp_path.glob("out.h5ad.unsaved-*")
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", kept.name}
    adata = make_cells()
    predict_cell_types(adata, classifier, threshold=0, progress=False)
    table = pd.read_csv(kept / "obs.csv", index_col=0)
    assert table["predicted_cell_type"].tolist() == adata.obs["predicted_cell_type"].tolist()


def test_a_view_of_a_backed_file_and_names_that_files_cannot_hold_raise_before_prediction(
    encoder: Path, tmp_path: Path
) -> None:
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"a view of .*cells\.h5ad"):
        predict_cell_types(backed[:10], "no/model", progress=False)
    with pytest.raises(ValueError, match=r"a view of .*cells\.h5ad"):
        transfer_labels(backed[:10], make_embedded(np.eye(4), list("aabb")))
    backed.file.close()
    with pytest.raises(ValueError, match="'a/b' cannot be the name"):
        predict_cell_types(make_cells(), "no/model", key_added="a/b", progress=False)


def test_a_file_that_cannot_be_annotated_leaves_nothing_behind(classifier: Path, tmp_path: Path) -> None:
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    annotate = partial(predict_cell_types, model=classifier, progress=False)
    annotate_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", annotate)
    with pytest.raises(FileExistsError, match="out"):
        annotate_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", annotate)
    with pytest.raises(ValueError, match="predicted_cell_type"):
        annotate_file(tmp_path / "out.h5ad", tmp_path / "again.h5ad", annotate)
    with pytest.raises(FileNotFoundError, match="absent"):
        annotate_file(tmp_path / "absent.h5ad", tmp_path / "again.h5ad", annotate)
    (tmp_path / "text.h5ad").write_text("no h5ad")
    with pytest.raises(ValueError, match="text"):
        annotate_file(tmp_path / "text.h5ad", tmp_path / "again.h5ad", annotate)
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "out.h5ad", "text.h5ad"}


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["annotate.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_predicts_with_a_classifier_and_transfers_from_a_reference(
    classifier: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = make_cells()
    reference.obs["cell_type"] = ["A", "B", "unknown"] * 10
    reference.write_h5ad(tmp_path / "reference.h5ad")
    make_cells().write_h5ad(tmp_path / "query.h5ad")
    query = tmp_path / "query.h5ad"
    common = "--device", "cpu", "--threshold", 0
    run_script(monkeypatch, query, "--model", classifier, "--out", tmp_path / "predicted.h5ad", *common)
    assert "Annotated 30 cells" in capsys.readouterr().out
    transfer = "--reference", tmp_path / "reference.h5ad", "--labels_key", "cell_type", "--model", encoder
    run_script(monkeypatch, query, *transfer, "--n_neighbors", 1, "--out", tmp_path / "transferred.h5ad", *common)
    assert "farther from the reference" in capsys.readouterr().out
    found = anndata.read_h5ad(tmp_path / "transferred.h5ad")
    assert found.obsm["X_scgpt"].shape == (30, 16)
    labelled = reference.obs["cell_type"] != "unknown"  # query and reference have the same cells
    assert found.obs["predicted_cell_type"][labelled].tolist() == reference.obs["cell_type"][labelled].tolist()
    with pytest.raises(SystemExit, match=r"annotate\.py: .*class_head"):
        run_script(monkeypatch, query, "--model", encoder, "--out", tmp_path / "x.h5ad")
    with pytest.raises(SystemExit):
        run_script(monkeypatch, query, "--out", tmp_path / "x.h5ad")
    assert "give --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels_key", "type"], r"no obs\['type'\]"),
        (["--n_neighbors", "200"], "200 neighbors"),
        (["--key_added", "cell_type"], r"\['cell_type'\] already"),
        ([], "without --model"),
    ],
)
def test_a_transfer_that_cannot_work_raises_before_cells_are_embedded(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    cells = make_cells()
    cells.obs["cell_type"] = ["A", "B", "unknown"] * 10
    cells.write_h5ad(tmp_path / "reference.h5ad")
    cells.obsm["X_scgpt"] = np.zeros((30, 16), np.float32)
    cells.write_h5ad(tmp_path / "query.h5ad")
    monkeypatch.setattr(inference, "iterate_outputs", lambda *_, **__: pytest.fail("cells were embedded"))
    common = "--reference", tmp_path / "reference.h5ad", "--model", encoder, "--out", tmp_path / "x.h5ad"
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, tmp_path / "query.h5ad", *common, "--n_neighbors", 5, *arguments)
