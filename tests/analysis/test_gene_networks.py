"""Test similar genes, gene programs and attention against plain forward passes and loops."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.gene_networks import (
    attention_maps,
    gene_embeddings,
    gene_programs,
    mean_attention,
    nearest_genes,
)
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

GENES = [f"GENE{number}" for number in range(20)]


@pytest.fixture(scope="module")
def processor() -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(GENES)


@pytest.fixture(scope="module")
def model(processor: ScGPTProcessor) -> ScGPTForPreTraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes)
    return ScGPTForPreTraining(config).eval()


def make_cells() -> AnnData:
    counts = np.random.default_rng(0).poisson(1.0, (6, 20)).astype(np.float32)
    counts[:, 0], counts[:, 1], counts[1:, 2] = 1, 0, 3
    return AnnData(csr_matrix(counts), pd.DataFrame(index=[f"cell{n}" for n in range(6)]), pd.DataFrame(index=GENES))


def test_gene_embeddings_are_those_that_the_encoder_adds(model: ScGPTForPreTraining, processor: ScGPTProcessor) -> None:
    found = gene_embeddings(model, processor)
    assert list(found.index) == GENES
    with torch.inference_mode():
        used = model.base_model(**processor(make_cells()[:1].copy())).gene_embedding[0, 1]
    np.testing.assert_allclose(found.loc["GENE0"], used, rtol=1e-6)
    with pytest.raises(ValueError, match=r"23 genes .* 8"):
        gene_embeddings(model, ScGPTProcessor.from_genes(GENES[:5]))


def test_the_nearest_genes_are_those_of_an_exhaustive_search(
    model: ScGPTForPreTraining, processor: ScGPTProcessor
) -> None:
    embeddings = gene_embeddings(model, processor)
    found = nearest_genes(embeddings, "GENE4", n=5)
    rows = {gene: row.to_numpy() for gene, row in embeddings.iterrows()}
    expected = {
        gene: row @ rows["GENE4"] / np.linalg.norm(row) / np.linalg.norm(rows["GENE4"])
        for gene, row in rows.items()
        if gene != "GENE4"
    }
    assert list(found.index) == sorted(expected, key=expected.get, reverse=True)[:5]
    np.testing.assert_allclose(found, [expected[gene] for gene in found.index], rtol=1e-5)
    with pytest.raises(ValueError, match="TP53"):
        nearest_genes(embeddings, "TP53")


def test_programs_separate_genes_that_differ_and_are_reproducible() -> None:
    rng = np.random.default_rng(0)
    centers = np.repeat(np.eye(8)[:3] * 5, [30, 20, 10], axis=0)
    embeddings = pd.DataFrame(centers + rng.normal(0, 0.1, (60, 8)), index=[f"g{i}" for i in range(60)])
    programs = gene_programs(embeddings, n_neighbors=5, resolution=0.05)
    assert [programs.iloc[part].nunique() for part in (slice(0, 30), slice(30, 50), slice(50, 60))] == [1, 1, 1]
    assert programs.iloc[[0, 30, 50]].tolist() == [0, 1, 2]
    pd.testing.assert_series_equal(programs, gene_programs(embeddings, n_neighbors=5, resolution=0.05))
    with pytest.raises(ValueError, match="found 3"):
        gene_programs(embeddings[:3])


def test_attention_equals_that_of_an_eager_forward_pass_of_each_cell(
    model: ScGPTForPreTraining, processor: ScGPTProcessor
) -> None:
    genes = ["GENE2", "GENE0", "GENE1"]
    before = model.config._attn_implementation
    maps = attention_maps(make_cells(), model, processor, genes, encoder_layer=0, progress=False)
    assert model.config._attn_implementation == before
    assert maps.shape == (6, 3, 3)
    assert np.isnan(maps[:, 2]).all()  # no cell expresses GENE1
    assert np.isnan(maps[:, :, 2]).all()
    midpoint = ScGPTProcessor.from_genes(GENES, ties="midpoint")
    model.set_attn_implementation("eager")
    for cell in range(1, 6):
        batch = midpoint(make_cells()[cell].copy())
        with torch.inference_mode():
            weights = model.base_model(**batch, output_attentions=True).attentions[0][0].mean(dim=0)
        names = midpoint.gene_names(batch["input_ids"][0])
        np.testing.assert_allclose(weights.sum(dim=-1), 1, rtol=1e-5)
        for row, query in enumerate(genes[:2]):
            for column, key in enumerate(genes[:2]):
                assert maps[cell, row, column] == pytest.approx(weights[names.index(query), names.index(key)].item())
    model.set_attn_implementation(before)
    with pytest.raises(ValueError, match="TP53"):
        attention_maps(make_cells(), model, processor, ["TP53"], progress=False)


def test_means_are_over_cells_in_which_both_genes_are_present() -> None:
    maps = np.full((3, 2, 2), np.nan, np.float32)
    maps[0], maps[1, 0, 0], maps[2, 0, 0] = 0.2, 0.4, 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        means = mean_attention(maps, ["A", "B"], ["T", "T", "B"])
    assert means["T"].loc["A", "A"] == pytest.approx(0.3)
    assert means["T"].loc["A", "B"] == pytest.approx(0.2)
    assert np.isnan(means["B"].loc["B", "A"])
    with pytest.raises(ValueError, match="for 2 cells and 2 genes"):
        mean_attention(maps, ["A", "B"], ["T", "B"])
