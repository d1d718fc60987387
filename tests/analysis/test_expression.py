"""Test expression prediction against direct forward passes, and the masked views and inverse binning under it."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, issparse

from scgpt_hf.analysis.expression import predict_expression
from scgpt_hf.analysis.inverse_binning import bins_to_counts, log1p_to_counts
from scgpt_hf.analysis.masked_views import make_masked_views
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel
from scgpt_hf.tokens.binning_scgpt import bin_ranges
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

IDS = [f"ENSG{number:011}" for number in range(40)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def make_cells() -> AnnData:
    """Make 12 cells of 30 genes; the model knows 40 genes, of which the data lack the last ten."""
    counts = np.random.default_rng(0).poisson(1.5, (12, 30)).astype(np.float32)
    var = pd.DataFrame({"feature_name": [f"GENE{number}" for number in range(30)]}, index=IDS[:30])
    return AnnData(
        csr_matrix(counts), obs=pd.DataFrame({"well": list("ab") * 6}, index=[f"cell{n}" for n in range(12)]), var=var
    )


@pytest.fixture(scope="module")
def processor() -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(IDS, n_bins=11, max_tokens=40)


def model_for(processor: ScGPTProcessor, **fields: object) -> ScGPTForPreTraining:
    torch.manual_seed(0)
    config = ScGPTConfig(
        vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, n_bins=11, dropout=0.5, **SIZES, **fields
    )
    return ScGPTForPreTraining(config)


@torch.inference_mode()
def direct(model: ScGPTForPreTraining, genes: list[int], values: list[float], masked: list[int]) -> dict[str, float]:
    """Run the model on one cell without the package's batching: `<cls>`, all genes, −1 where masked."""
    model.eval()
    output = model(
        input_ids=torch.tensor([[41, *genes]]),
        values=torch.tensor(
            [[0.0, *(-1.0 if gene in masked else value for gene, value in zip(genes, values, strict=True))]]
        ),
    )
    return {name: dict(zip(genes, output[name][0, 1:].tolist(), strict=True)) for name in ("gep", "gepc")}


def test_genes_masked_one_by_one_are_predicted_as_by_a_direct_forward_pass(processor: ScGPTProcessor) -> None:
    adata, model = make_cells(), model_for(processor).train()
    found = predict_expression(adata, model, processor, masked_share=0.01, batch_size=7, progress=False)
    assert model.training
    assert processor.cls_id == 41
    midpoint = ScGPTProcessor.from_genes(IDS, n_bins=11, max_tokens=40, ties="midpoint")
    for cell in (0, 5):
        tokens = midpoint.tokenize(csr_matrix(adata.X)[cell], np.arange(30), seed=0, epoch=0)
        genes, values = tokens.input_ids[1:].tolist(), tokens.values[1:].tolist()
        for gene in genes:
            expected = direct(model, genes, values, [gene])
            for head in ("gep", "gepc"):
                assert found.layers[head][cell, gene] == pytest.approx(expected[head][gene], abs=1e-5)
        np.testing.assert_array_equal(found.layers["bins"][cell].toarray()[0, genes], values)
    assert (found.layers["gep"] != 0).sum() == (adata.X != 0).sum() == (found.layers["bins"] != 0).sum()
    assert list(found.var_names) == IDS[:30]
    assert found.obs.equals(adata.obs)
    assert (found.layers["gep_counts"] != found.X).nnz == 0
    assert found.uns["scgpt_expression"]["genes"]["unknown"] == 0


def test_requested_genes_are_predicted_in_every_cell_even_if_the_data_lack_them(
    processor: ScGPTProcessor,
) -> None:
    adata, model = make_cells(), model_for(processor)
    found = predict_expression(adata, model, processor, genes=[IDS[35], "GENE3"], progress=False, batch_size=5)
    assert list(found.var_names) == [IDS[35], "GENE3"]
    assert found.var["feature_name"].tolist() == ["", "GENE3"]
    assert found.var["in_data"].tolist() == [False, True]
    assert not any(issparse(found.layers[name]) for name in found.layers)
    assert np.isnan(found.layers["bins"][:, 0]).all()
    assert np.isfinite(found.layers["bins"][:, 1]).all()
    midpoint = ScGPTProcessor.from_genes(IDS, n_bins=11, max_tokens=40, ties="midpoint")
    for cell in range(12):
        counts = csr_matrix(adata.X)[cell]
        tokens = midpoint.tokenize(counts, np.arange(30), seed=0, epoch=0)
        seen = [
            (g, v) for g, v in zip(tokens.input_ids[1:].tolist(), tokens.values[1:].tolist(), strict=True) if g != 3
        ]
        genes, values = [g for g, _ in seen] + [35, 3], [v for _, v in seen] + [0.0, 0.0]
        expected = direct(model, genes, values, [35, 3])
        for column, gene in enumerate((35, 3)):
            assert found.layers["gep"][cell, column] == pytest.approx(expected["gep"][gene], abs=1e-5)
            assert found.layers["gepc"][cell, column] == pytest.approx(expected["gepc"][gene], abs=1e-5)
        np.testing.assert_allclose(
            found.layers["gepc_counts"][cell], bins_to_counts(found.layers["gepc"][cell], counts.data, 11), rtol=1e-5
        )


def test_the_batch_size_does_not_change_the_result_which_can_be_written(
    processor: ScGPTProcessor, tmp_path: Path
) -> None:
    import anndata

    adata, model = make_cells(), model_for(processor, explicit_zero_prob=True)
    one, many = (predict_expression(adata, model, processor, batch_size=n, progress=False) for n in (1, 100))
    assert set(one.layers) - {None} == {
        "gep", "gepc", "gep_counts", "gepc_counts", "gep_expressed", "gepc_expressed", "bins"
    }  # fmt: skip
    for name in set(one.layers) - {None}:
        np.testing.assert_allclose(one.layers[name].toarray(), many.layers[name].toarray(), atol=1e-5)
    assert ((one.layers["gep_expressed"].data > 0) & (one.layers["gep_expressed"].data < 1)).all()
    one.write_h5ad(tmp_path / "predicted.h5ad")
    assert (anndata.read_h5ad(tmp_path / "predicted.h5ad").X != one.X).nnz == 0


def test_a_model_that_reads_visible_genes_only_predicts_without_masked_tokens() -> None:
    processor = ScGPTProcessor.from_genes(IDS, n_bins=11, max_tokens=40, ties="midpoint")
    model = model_for(processor, loss_weights={"gepc": 1.0}, leave_out_masked=True).eval()
    adata = make_cells()[:1]
    found = predict_expression(adata, model, processor, genes=[IDS[3]], progress=False)
    batch = processor(adata)
    visible = batch["input_ids"] != 3
    with torch.inference_mode():
        gene = torch.tensor([3])
        output = model(
            input_ids=batch["input_ids"][visible][None],
            values=batch["values"][visible][None],
            **{"label_ids": gene, "label_cells": torch.tensor([0])},
        )
    assert found.layers["gepc"].item() == pytest.approx(output.gepc.item(), rel=1e-5)


def test_log1p_predictions_are_mapped_to_counts_by_the_total_of_the_cell() -> None:
    processor = ScGPTProcessor.from_genes(IDS, input_style="log1p", target_sum=100.0)
    adata = make_cells()
    found = predict_expression(adata, model_for(processor), processor, genes=[IDS[2]], progress=False)
    for cell in range(12):
        expected = log1p_to_counts(found.layers["gep"][cell], float(adata.X[cell].sum()), 100.0)
        np.testing.assert_allclose(found.layers["gep_counts"][cell], expected, rtol=1e-5)
    counts, total = np.array([1.0, 7.0]), 55.0
    np.testing.assert_allclose(log1p_to_counts(np.log1p(counts * 100 / total), total, 100.0), counts)
    assert log1p_to_counts(np.array([-0.3]), total, 100.0).tolist() == [0.0]


def test_columns_of_one_symbol_are_predicted_as_their_sum() -> None:
    adata = make_cells()
    processor = ScGPTProcessor.from_genes([f"GENE{number}" for number in range(28)], n_bins=11, max_tokens=40)
    adata.var["feature_name"] = [f"GENE{number % 28}" for number in range(30)]
    summed = adata[:, :28].copy()
    counts = adata.X.toarray()
    counts[:, :2] += counts[:, 28:]
    summed.X = csr_matrix(counts[:, :28])
    model = model_for(processor)
    for genes in (None, ["GENE0", "GENE5"]):
        found = predict_expression(adata, model, processor, genes=genes, progress=False)
        expected = predict_expression(summed, model, processor, genes=genes, progress=False)
        assert found.var_names.tolist() == expected.var_names.tolist()
        for layer in expected.layers:
            np.testing.assert_array_equal(
                csr_matrix(found.layers[layer]).toarray(), csr_matrix(expected.layers[layer]).toarray(), err_msg=layer
            )


def test_a_saved_checkpoint_predicts_as_the_loaded_model(processor: ScGPTProcessor, tmp_path: Path) -> None:
    model = model_for(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = predict_expression(make_cells(), tmp_path, progress=False)
    expected = predict_expression(make_cells(), model, processor, progress=False)
    np.testing.assert_allclose(found.X.toarray(), expected.X.toarray(), atol=1e-4)
    assert found.uns["scgpt_expression"]["model"] == str(tmp_path)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    requested=st.none() | st.lists(st.integers(0, 39), min_size=1, unique=True),
    share=st.floats(0.01, 1.0),
    max_tokens=st.integers(2, 25),
)
@settings(deadline=None, max_examples=60)
def test_every_requested_gene_is_masked_once_and_never_visible_in_the_same_view(
    lengths: list[int], requested: list[int] | None, share: float, max_tokens: int
) -> None:
    processor = ScGPTProcessor.from_genes(IDS, max_tokens=max_tokens)
    genes = [np.sort(np.random.default_rng(cell).permutation(40)[:n]) for cell, n in enumerate(lengths)]
    input_ids = np.concatenate([np.array([41, *own]) for own in genes])
    indptr = np.concatenate([[0], np.cumsum([n + 1 for n in lengths])])
    tokens = Tokens(input_ids, input_ids.astype(np.float32), None, indptr, np.arange(len(lengths)))
    to_mask = None if requested is None else np.array(requested)
    views = list(make_masked_views(tokens, to_mask, processor, masked_share=share))
    for cell, own in enumerate(genes):
        found = []
        for view in (view for view in views if view.cell_ids[0] == cell):
            masked = view.labels != IGNORE
            found += view.input_ids[masked].tolist()
            visible = view.input_ids[~masked]
            assert len(view.input_ids) <= max_tokens
            assert 1 <= masked.sum() <= max(1, share * min(len(own), max_tokens - 1))
            assert visible[0] == 41
            assert set(visible[1:]) <= set(own) - set(view.input_ids[masked])
            assert (view.values[masked] == processor.mask_value).all()
            np.testing.assert_array_equal(view.values[~masked], visible)
            if len(own) < max_tokens and requested is None:
                assert len(view.input_ids) == len(own) + 1
        assert sorted(found) == sorted(own if requested is None else requested)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=60), n_bins=st.integers(2, 51))
@settings(deadline=None, max_examples=100)
def test_bins_of_a_cell_map_back_to_its_counts(counts: list[int], n_bins: int) -> None:
    values = np.array(counts, np.float64)
    lowest, highest = bin_ranges(values, n_bins)
    middles = (lowest + highest) / 2
    found = bins_to_counts(middles, values, n_bins)
    for middle, back in zip(middles, found, strict=True):  # the mean of all counts with the same middle
        assert back == pytest.approx(values[middles == middle].mean())
    grid = bins_to_counts(np.linspace(-5, n_bins + 5, 200), values, n_bins)
    assert (np.diff(grid) >= -1e-9).all()
    assert (grid[0], grid[-1]) == (pytest.approx(found.min()), pytest.approx(found.max()))
    assert values.min() <= grid[0]
    assert grid[-1] <= values.max()
    assert all(high == low for low, high in pairwise(np.sort(found)) if low == high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": [IDS[0], "TP53"]}, r"1 of the 2 .*\['TP53'\]"),
        ({"genes": [IDS[0], "GENE0"]}, "each once"),
        ({"genes": []}, "each once"),
        ({"masked_share": 0.0}, "masked_share .*found 0"),
        ({"processor": None}, "needs its processor"),
        ({"processor": ScGPTProcessor.from_genes(IDS[:35])}, "43 genes .* 38"),
        ({"layer": "logged"}, "raw counts"),
    ],
)
def test_arguments_that_cannot_be_used_raise_an_error(processor: ScGPTProcessor, change: dict, message: str) -> None:
    adata = make_cells()
    adata.layers["logged"] = adata.X.log1p()
    arguments = {"adata": adata, "model": model_for(processor), "processor": processor, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        predict_expression(**arguments)


def test_cells_without_a_known_gene_raise_an_error_that_lists_them(processor: ScGPTProcessor) -> None:
    adata = make_cells()
    adata.X = csr_matrix(adata.X.multiply((np.arange(12) != 4)[:, None]))
    with pytest.raises(ValueError, match=r"first ids: \[4\]"):
        predict_expression(adata, model_for(processor), processor, progress=False)


def test_a_model_without_trained_expression_heads_raises_an_error(processor: ScGPTProcessor, tmp_path: Path) -> None:
    model = model_for(processor)
    with pytest.raises(ValueError, match="ScGPTModel has no expression_head"):
        predict_expression(make_cells(), ScGPTModel(model.config), processor, progress=False)
    ScGPTForSequenceClassification(model.config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cell_to_gene_head and no expression_head"):
        predict_expression(make_cells(), tmp_path, progress=False)
