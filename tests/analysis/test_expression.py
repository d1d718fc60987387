"""Genes filled in: each hidden once, as a direct forward pass predicts it, and counts as the cell's own bins say."""

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
from scgpt_hf.analysis.inverse_binning import counts_of_bins, counts_of_log1p
from scgpt_hf.analysis.masked_views import hide_in_turn
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel
from scgpt_hf.tokens.binning_scgpt import bin_ranges
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

IDS = [f"ENSG{number:011}" for number in range(40)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def some_cells() -> AnnData:
    """12 cells of 30 genes; the model knows 40, of which the data lack the last ten."""
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
def direct(model: ScGPTForPreTraining, genes: list[int], values: list[float], hidden: list[int]) -> dict[str, float]:
    """One cell, padded, the plain forward pass: `<cls>`, all genes, −1 where hidden."""
    model.eval()
    output = model(
        input_ids=torch.tensor([[41, *genes]]),
        values=torch.tensor(
            [[0.0, *(-1.0 if gene in hidden else value for gene, value in zip(genes, values, strict=True))]]
        ),
    )
    return {name: dict(zip(genes, output[name][0, 1:].tolist(), strict=True)) for name in ("gep", "gepc")}


def test_one_gene_at_a_time_is_as_a_direct_forward_pass_predicts_it(processor: ScGPTProcessor) -> None:
    adata, model = some_cells(), model_for(processor).train()
    found = predict_expression(adata, model, processor, hidden_share=0.01, batch_size=7, progress=False)
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


def test_genes_asked_for_are_predicted_in_every_cell_by_id_or_symbol_though_the_data_lack_them(
    processor: ScGPTProcessor,
) -> None:
    adata, model = some_cells(), model_for(processor)
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
            found.layers["gepc_counts"][cell], counts_of_bins(found.layers["gepc"][cell], counts.data, 11), rtol=1e-5
        )


def test_the_batch_size_changes_nothing_and_a_file_keeps_the_result(processor: ScGPTProcessor, tmp_path: Path) -> None:
    import anndata

    adata, model = some_cells(), model_for(processor, explicit_zero_prob=True)
    one, many = (predict_expression(adata, model, processor, batch_size=n, progress=False) for n in (1, 100))
    assert set(one.layers) == {
        "gep", "gepc", "gep_counts", "gepc_counts", "gep_expressed", "gepc_expressed", "bins"
    }  # fmt: skip
    for name in one.layers:
        np.testing.assert_allclose(one.layers[name].toarray(), many.layers[name].toarray(), atol=1e-5)
    assert ((one.layers["gep_expressed"].data > 0) & (one.layers["gep_expressed"].data < 1)).all()
    one.write_h5ad(tmp_path / "predicted.h5ad")
    assert (anndata.read_h5ad(tmp_path / "predicted.h5ad").X != one.X).nnz == 0


def test_log1p_input_is_mapped_back_by_the_total_of_the_cell() -> None:
    processor = ScGPTProcessor.from_genes(IDS, input_style="log1p", target_sum=100.0)
    adata = some_cells()
    found = predict_expression(adata, model_for(processor), processor, genes=[IDS[2]], progress=False)
    for cell in range(12):
        expected = counts_of_log1p(found.layers["gep"][cell], float(adata.X[cell].sum()), 100.0)
        np.testing.assert_allclose(found.layers["gep_counts"][cell], expected, rtol=1e-5)
    counts, total = np.array([1.0, 7.0]), 55.0
    np.testing.assert_allclose(counts_of_log1p(np.log1p(counts * 100 / total), total, 100.0), counts)
    assert counts_of_log1p(np.array([-0.3]), total, 100.0).tolist() == [0.0]


def test_a_saved_checkpoint_predicts_as_the_loaded_one(processor: ScGPTProcessor, tmp_path: Path) -> None:
    model = model_for(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = predict_expression(some_cells(), tmp_path, progress=False)
    expected = predict_expression(some_cells(), model, processor, progress=False)
    np.testing.assert_allclose(found.X.toarray(), expected.X.toarray(), atol=1e-4)
    assert found.uns["scgpt_expression"]["model"] == str(tmp_path)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    asked=st.none() | st.lists(st.integers(0, 39), min_size=1, unique=True),
    share=st.floats(0.01, 1.0),
    max_tokens=st.integers(2, 25),
)
@settings(deadline=None, max_examples=60)
def test_every_gene_is_hidden_once_and_never_seen_with_itself(
    lengths: list[int], asked: list[int] | None, share: float, max_tokens: int
) -> None:
    processor = ScGPTProcessor.from_genes(IDS, max_tokens=max_tokens)
    genes = [np.sort(np.random.default_rng(cell).permutation(40)[:n]) for cell, n in enumerate(lengths)]
    input_ids = np.concatenate([np.array([41, *own]) for own in genes])
    indptr = np.concatenate([[0], np.cumsum([n + 1 for n in lengths])])
    tokens = Tokens(input_ids, input_ids.astype(np.float32), None, indptr, np.arange(len(lengths)))
    looks = list(hide_in_turn(tokens, None if asked is None else np.array(asked), processor, share=share))
    for cell, own in enumerate(genes):
        hidden = []
        for look in (look for look in looks if look.cell_ids[0] == cell):
            masked = look.labels != IGNORE
            hidden += look.input_ids[masked].tolist()
            seen = look.input_ids[~masked]
            assert len(look.input_ids) <= max_tokens
            assert 1 <= masked.sum() <= max(1, share * min(len(own), max_tokens - 1))
            assert seen[0] == 41
            assert set(seen[1:]) <= set(own) - set(look.input_ids[masked])
            assert (look.values[masked] == processor.mask_value).all()
            np.testing.assert_array_equal(look.values[~masked], seen)
            if len(own) < max_tokens and asked is None:
                assert len(look.input_ids) == len(own) + 1
        assert sorted(hidden) == sorted(own if asked is None else asked)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=60), n_bins=st.integers(2, 51))
@settings(deadline=None, max_examples=100)
def test_bins_of_a_cell_map_back_to_its_counts(counts: list[int], n_bins: int) -> None:
    values = np.array(counts, np.float64)
    lowest, highest = bin_ranges(values, n_bins)
    middles = (lowest + highest) / 2
    found = counts_of_bins(middles, values, n_bins)
    for middle, back in zip(middles, found, strict=True):  # the slow way: the mean of all counts with these bins
        assert back == pytest.approx(values[middles == middle].mean())
    grid = counts_of_bins(np.linspace(-5, n_bins + 5, 200), values, n_bins)
    assert (np.diff(grid) >= -1e-9).all()
    assert (grid[0], grid[-1]) == (pytest.approx(found.min()), pytest.approx(found.max()))
    assert values.min() <= grid[0]
    assert grid[-1] <= values.max()
    assert all(high == low for low, high in pairwise(np.sort(found)) if low == high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": [IDS[0], "TP53"]}, r"does not know 1 of the 2 genes asked for, e.g. \['TP53'\]"),
        ({"genes": [IDS[0], "GENE0"]}, "each once"),
        ({"genes": []}, "each once"),
        ({"hidden_share": 0.0}, r"hidden_share in \(0, 1\], found 0"),
        ({"processor": None}, "a loaded model needs its processor"),
        ({"processor": ScGPTProcessor.from_genes(IDS[:35])}, "load both from one folder"),
        ({"layer": "logged"}, "expected raw counts"),
    ],
)
def test_what_cannot_be_predicted_is_refused(processor: ScGPTProcessor, change: dict, message: str) -> None:
    adata = some_cells()
    adata.layers["logged"] = adata.X.log1p()
    arguments = {"adata": adata, "model": model_for(processor), "processor": processor, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        predict_expression(**arguments)


def test_cells_without_a_known_gene_are_refused(processor: ScGPTProcessor) -> None:
    adata = some_cells()
    adata.X = csr_matrix(adata.X.multiply((np.arange(12) != 4)[:, None]))
    with pytest.raises(ValueError, match="1 cells express no gene that the model knows"):
        predict_expression(adata, model_for(processor), processor, progress=False)


def test_a_model_without_expression_heads_is_refused(processor: ScGPTProcessor, tmp_path: Path) -> None:
    model = model_for(processor)
    with pytest.raises(ValueError, match="ScGPTModel has no head that predicts expression"):
        predict_expression(some_cells(), ScGPTModel(model.config), processor, progress=False)
    ScGPTForSequenceClassification(model.config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no trained cell_to_gene_head and no expression_head"):
        predict_expression(some_cells(), tmp_path, progress=False)
