"""Each modality of a cell is binned, normalized and sampled by itself."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.tokenizing_scgpt import share_tokens

N_RNA, N_PROTEIN = 30, 5
GENES = [f"ENSG{n:011}" for n in range(N_RNA)] + [f"protein:P{n}" for n in range(N_PROTEIN)]
MODALITIES = ["RNA"] * N_RNA + ["protein"] * N_PROTEIN


def processor_of(columns: slice, **options: Any) -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(GENES[columns], n_bins=11, **options)


def random_counts(seed: int, n_cells: int = 8) -> csr_matrix:
    rng = np.random.default_rng(seed)
    counts = np.hstack([rng.poisson(0.8, (n_cells, N_RNA)), rng.poisson(40.0, (n_cells, N_PROTEIN))])
    counts[0, N_RNA:] = 0  # a cell without proteins
    counts[1, :N_RNA] = 0  # one without RNA
    counts[2] = 0  # an empty one
    return csr_matrix(counts.astype(np.float32))


def tokens_by_cell(processor: ScGPTProcessor, counts: csr_matrix, ids: np.ndarray) -> dict[int, dict[int, float]]:
    tokens = processor.tokenize(counts, ids, cell_ids=np.arange(counts.shape[0]), seed=3, epoch=1)
    cells = {}
    for cell, (start, stop) in zip(tokens.cell_ids.tolist(), pairwise(tokens.indptr), strict=True):
        assert tokens.input_ids[start] == processor.cls_id
        assert (np.diff(tokens.input_ids[start + 1 : stop]) > 0).all()
        own = slice(start + 1, stop)
        cells[cell] = dict(zip(tokens.input_ids[own].tolist(), tokens.values[own].tolist(), strict=True))
    return cells


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), style=st.sampled_from(["binned", "log1p"]), ties=st.sampled_from(["random", "upper"]))
def test_a_cell_has_the_tokens_of_each_modality_alone(seed: int, style: Any, ties: Any) -> None:
    counts, order = random_counts(seed), np.random.default_rng(seed).permutation(len(GENES))
    options: Any = {"input_style": style, "ties": ties}
    joint = ScGPTProcessor.from_genes(GENES, n_bins=11, modalities=MODALITIES, **options)
    shuffled = csr_matrix(counts[:, order])
    shuffled.sort_indices()
    found = tokens_by_cell(joint, shuffled, order)
    assert sorted(found) == [0, 1, *range(3, 8)]
    # Alone: the same ids, so that the random numbers of ties are the same, but the columns of one modality only.
    single = ScGPTProcessor.from_genes(GENES, n_bins=11, **options)
    parts = [slice(0, N_RNA), slice(N_RNA, len(GENES))]
    alone = [tokens_by_cell(single, csr_matrix(counts[:, part]), np.arange(len(GENES))[part]) for part in parts]
    for cell, tokens in found.items():
        assert tokens == alone[0].get(cell, {}) | alone[1].get(cell, {})


def test_proteins_span_all_bins_though_their_counts_are_high() -> None:
    joint = ScGPTProcessor.from_genes(GENES, n_bins=11, modalities=MODALITIES, ties="upper")
    mixed = ScGPTProcessor.from_genes(GENES, n_bins=11, ties="upper")
    counts = random_counts(0)
    apart, together = (tokens_by_cell(one, counts, np.arange(len(GENES)))[5] for one in (joint, mixed))
    assert min(value for gene, value in apart.items() if gene >= N_RNA) <= 1
    assert min(value for gene, value in together.items() if gene >= N_RNA) > 5


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), max_tokens=st.integers(7, 40))
def test_small_panels_are_complete_and_cells_are_not_too_long(seed: int, max_tokens: int) -> None:
    joint = ScGPTProcessor.from_genes(GENES, n_bins=11, modalities=MODALITIES, max_tokens=max_tokens)
    counts = random_counts(seed)
    for cell, tokens in tokens_by_cell(joint, counts, np.arange(len(GENES))).items():
        assert len(tokens) < max_tokens
        n_proteins = sum(gene >= N_RNA for gene in tokens)
        measured = int((counts[cell, N_RNA:] > 0).sum())
        assert n_proteins == min(measured, N_PROTEIN if max_tokens > 2 * N_PROTEIN else (max_tokens - 1) // 2)


@given(n_tokens=st.integers(0, 500), sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4))
def test_shares_are_fair(n_tokens: int, sizes: list[int]) -> None:
    shares = share_tokens(n_tokens, sizes)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert sum(shares) == min(n_tokens, sum(sizes))
    cut = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert all(share <= min(cut, default=500) + len(sizes) for share in shares)


def test_modalities_are_saved_and_loaded(tmp_path: Any) -> None:
    joint = ScGPTProcessor.from_genes(GENES, modalities=MODALITIES)
    joint.save_pretrained(tmp_path)
    loaded = ScGPTProcessor.from_pretrained(tmp_path)
    assert loaded.modalities == MODALITIES
    assert loaded.modality_names == ["RNA", "protein", "<pad>", "<cls>"]
    ids = loaded.modality_ids(loaded.modality_names)
    assert ids.tolist() == [0] * N_RNA + [1] * N_PROTEIN + [2, 3, 2]  # then <pad>, <cls> and <eoc>
    assert ScGPTProcessor.from_genes(GENES).modality_names == []


@pytest.mark.parametrize(
    ("modalities", "message"),
    [(["RNA"], "found 1 modalities for 35 genes"), (["<cls>"] * 35, "no gene can have the modality '<cls>'")],
)
def test_wrong_modalities_raise(modalities: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScGPTProcessor.from_genes(GENES, modalities=modalities)


def test_names_of_another_model_raise() -> None:
    joint = ScGPTProcessor.from_genes(GENES, modalities=MODALITIES)
    with pytest.raises(ValueError, match=r"modalities \['protein'\] besides these"):
        joint.modality_ids(["RNA", "<pad>", "<cls>"])
    with pytest.raises(ValueError, match="no modalities"):
        ScGPTProcessor.from_genes(GENES).modality_ids(["RNA", "<pad>", "<cls>"])
