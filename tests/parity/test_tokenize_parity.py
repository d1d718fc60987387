"""Tokens and masks equal those of scGPT: fine-tuning tokenizer, inference collator, masking and embed_data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from scgpt_hf.tokens.counts_scgpt import validate_counts
from scgpt_hf.tokens.masking_scgpt import mask_tokens
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, pad
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.tokenizing_scgpt import TokenSettings, tokenize_counts


@pytest.fixture(scope="module")
def folder(fixtures: Path) -> Path:
    return fixtures


@pytest.fixture(scope="module")
def vocab(folder: Path) -> dict[str, int]:
    vocab: dict[str, int] = json.loads((folder / "base_continuous" / "vocab.json").read_text())
    return vocab


def _cells(ids: np.ndarray, values: np.ndarray, pad_id: int) -> list[dict[int, float]]:
    """Return each row as {id: value}: scGPT's code orders genes by column, we order them by id."""
    return [
        {int(i): float(v) for i, v in zip(*row, strict=True) if i != pad_id} for row in zip(ids, values, strict=True)
    ]


@pytest.mark.parametrize(("kind", "include_zeros"), [("no_zeros", False), ("with_zeros", True)])
def test_genes_and_values_equal_the_fine_tuning_tokenizer(
    folder: Path, vocab: dict[str, int], kind: str, include_zeros: bool
) -> None:
    tensors = load_file(folder / "tokenize" / "tokenize.safetensors")
    settings = TokenSettings(len(vocab), vocab["<cls>"], 0.0, 1201, None, "random", include_zeros)
    counts, ids = validate_counts(csr_matrix(tensors["counts"])), tensors["gene_ids_of_columns"]
    tokens = tokenize_counts(counts, ids, settings, cell_ids=np.arange(counts.shape[0]), seed=0, epoch=0)
    batch = pad(tokens, pad_id=vocab["<pad>"], pad_value=-2.0)
    genes, values = tensors[f"genes_{kind}"], tensors[f"values_{kind}"]
    assert batch["input_ids"].shape == genes.shape
    assert (batch["input_ids"][:, 0] == genes[0, 0]).all()
    ours = _cells(batch["input_ids"].numpy(), batch["values"].numpy(), vocab["<pad>"])
    assert ours == _cells(genes, values, vocab["<pad>"])
    np.testing.assert_array_equal(np.sort(batch["values"].numpy(), 1), np.sort(values, 1))  # so padding agrees too


def test_binned_values_equal_the_inference_collator(folder: Path, vocab: dict[str, int]) -> None:
    tensors = load_file(folder / "tokenize" / "tokenize.safetensors")
    processor = ScGPTProcessor.from_vocab(vocab, cls_value=-2.0)
    ids = tensors["gene_ids_of_columns"]
    batch = processor(tensors["collator_rows"], processor.gene_names(ids))
    ours = _cells(batch["input_ids"].numpy(), batch["values"].numpy(), vocab["<pad>"])
    assert ours == _cells(tensors["collator_gene"], tensors["collator_expr"], vocab["<pad>"])


def masked_where(tokens: Tokens, ratios: np.ndarray, *, seed: int, n_first: int = 1) -> np.ndarray:
    """Return which tokens are masked."""
    labels = mask_tokens(tokens, ratios, seed=seed, epoch=0, mask_value=-1.0, n_first=n_first).labels
    assert labels is not None
    masked: np.ndarray = labels != IGNORE
    return masked


def test_masked_share_counts_as_the_original_when_cls_may_be_masked(folder: Path, vocab: dict[str, int]) -> None:
    tensors = load_file(folder / "tokenize" / "tokenize.safetensors")
    settings = TokenSettings(len(vocab), vocab["<cls>"], 0.0, 1201, None, "random", False)
    counts, ids = validate_counts(csr_matrix(tensors["counts"])), tensors["gene_ids_of_columns"]
    tokens = tokenize_counts(counts, ids, settings, cell_ids=np.arange(counts.shape[0]), seed=0, epoch=0)
    ratios = np.full(len(tokens), 0.5)
    original = (tensors["random_mask_value_seed3"] == -1).sum(1)
    masked = masked_where(tokens, ratios, seed=3, n_first=0)
    np.testing.assert_array_equal(np.add.reduceat(masked, tokens.indptr[:-1]), original)
    of_genes = masked_where(tokens, ratios, seed=3)
    np.testing.assert_array_equal(np.add.reduceat(of_genes, tokens.indptr[:-1]), (np.diff(tokens.indptr) - 1) // 2)
    assert not of_genes[tokens.indptr[:-1]].any()
    draws = [masked_where(tokens, ratios, seed=seed, n_first=0)[tokens.indptr[:-1]] for seed in range(500)]
    expected = np.floor(0.5 * np.diff(tokens.indptr)) / np.diff(tokens.indptr)
    np.testing.assert_allclose(np.mean(draws, 0), expected, atol=0.08)


def _original_bins(row: np.ndarray, n_bins: int) -> np.ndarray:
    """Return the bins of expression without ties, computed with `np.quantile` and `np.digitize`."""
    return np.digitize(row, np.quantile(row, np.linspace(0, 1, n_bins - 1)))


def test_embed_data_input_is_binned_over_the_genes_of_the_vocabulary(folder: Path, vocab: dict[str, int]) -> None:
    settings: dict[str, Any] = json.loads((folder / "embed_data" / "embed_data.json").read_text())
    counts = load_file(folder / "embed_data" / "embed_data.safetensors")["X"]
    processor = ScGPTProcessor.from_vocab(
        vocab, n_bins=settings["n_bins"], max_tokens=settings["max_length"], cls_value=settings["cls_value"]
    )
    batch = processor(counts, settings["gene_names"])
    known = np.array([name in vocab for name in settings["gene_names"]])
    ids = np.array([vocab.get(name, -1) for name in settings["gene_names"]])
    ours = _cells(batch["input_ids"].numpy(), batch["values"].numpy(), vocab["<pad>"])
    for row, cell in zip(counts, ours, strict=True):
        seen = known & (row > 0)
        bins = _original_bins(row[seen], settings["n_bins"])
        assert cell == {vocab["<cls>"]: -2.0} | dict(zip(ids[seen].tolist(), bins.tolist(), strict=True))
