"""Converted checkpoints give the embeddings of scGPT's zero-shot `embed_data`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

from scgpt_hf.analysis.embed import embed_anndata
from scgpt_hf.conversion.checkpoint import convert_scgpt, save_converted
from scgpt_hf.tokens.counts_scgpt import to_csr
from scgpt_hf.tokens.packing_scgpt import pack, pad

Given = tuple[dict[str, Any], dict[str, np.ndarray], Path]


@pytest.fixture(scope="module")
def given(fixtures: Path) -> Given:
    """The settings of the run of scGPT's code, its expression and embeddings, and the folder of its model."""
    about = json.loads((fixtures / "embed_data" / "embed_data.json").read_text())
    return about, load_file(fixtures / "embed_data" / "embed_data.safetensors"), fixtures / about["model_dir"]


@pytest.mark.parametrize("weights_file", ["best_model.pt", "best_model.flash_direct.pt", "best_model.flash_wrapped.pt"])
@pytest.mark.parametrize("packed", [False, True])
def test_processor_and_model_give_the_originals_vectors(given: Given, packed: bool, weights_file: str) -> None:
    about, tensors, folder = given
    model, processor, _ = convert_scgpt(folder, weights_file=weights_file)
    assert processor.cls_value == about["cls_value"]
    assert processor.max_tokens == about["max_length"]
    processor.n_bins = about["n_bins"]  # that run used this number, not that of args.json
    counts = to_csr(tensors["X"])
    tokens = processor.tokenize(counts, processor.match_genes(about["gene_names"]), seed=0, epoch=0)
    batch = pack(tokens) if packed else pad(tokens, pad_id=processor.pad_id, pad_value=processor.pad_value)
    with torch.no_grad():
        cells = torch.nn.functional.normalize(model.base_model(**batch).cell_embedding)
    np.testing.assert_allclose(cells.numpy(), tensors["X_scGPT"], atol=2e-5, rtol=1e-4)


def test_embed_anndata_gives_the_originals_vectors(given: Given, tmp_path: Path) -> None:
    about, tensors, folder = given
    model, processor, report = convert_scgpt(folder)
    processor.n_bins = about["n_bins"]
    out = save_converted(model, processor, report, tmp_path / "converted")
    # embed_anndata requires raw counts, and the fixture has none. Bins depend on ranks only, so ranks replace counts.
    ranks = np.where(tensors["X"] > 0, rankdata(tensors["X"], axis=1, method="dense"), 0)
    adata = AnnData(csr_matrix(ranks.astype(np.float32)))
    adata.var_names = about["gene_names"]
    summary = embed_anndata(adata, out, batch_size=3, progress=False)
    np.testing.assert_allclose(adata.obsm["X_scgpt"], tensors["X_scGPT"], atol=2e-5, rtol=1e-4)
    assert (summary["cls_value"], summary["n_bins"]) == (about["cls_value"], about["n_bins"])
    assert summary["genes"]["unknown"] == sum("NOTINVOCAB" in name for name in about["gene_names"])
