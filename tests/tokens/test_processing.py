"""The processor: what it accepts, what it rejects, and that a saved processor loads unchanged."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_matrix
from transformers import AutoProcessor, AutoTokenizer

import scgpt_hf  # noqa: F401  # registers the processor
from scgpt_hf.tokens import processing_scgpt
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

GENES = [f"ENSG{i:011d}" for i in range(60)]
SETTINGS: dict[str, Any] = {
    "n_bins": 11,
    "max_tokens": 20,
    "cls_value": -2.0,
    "pad_value": -3.0,
    "mask_value": -4.0,
    "ties": "midpoint",
    "input_style": "log1p",
    "target_sum": 1000.0,
    "include_zeros": True,
}


def _counts(seed: int = 0, n_cells: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 2, (n_cells, 60))).astype(np.float32)
    counts[:, 0] += 1  # no cell is empty
    return counts


def _rows(batch: dict[str, torch.Tensor]) -> list[list[tuple[int, float]]]:
    real = batch["attention_mask"]
    ids, values = batch["input_ids"], batch["values"]
    return [list(zip(ids[i, real[i]].tolist(), values[i, real[i]].tolist(), strict=True)) for i in range(len(ids))]


def test_from_genes_numbers_genes_in_order() -> None:
    processor = ScGPTProcessor.from_genes(GENES[::-1])
    assert (processor.vocab_size, processor.pad_id, processor.cls_id) == (63, 60, 61)
    assert processor.genes == GENES[::-1]
    assert processor.gene_names(np.array([0, 61, 59])) == [GENES[-1], "<cls>", GENES[0]]
    assert processor.match_genes(GENES).tolist() == list(range(59, -1, -1))


def test_special_tokens_may_have_any_id_in_a_published_vocabulary() -> None:
    vocab = {"<cls>": 0, **{gene: i + 1 for i, gene in enumerate(GENES[:30])}, "<pad>": 31}
    vocab |= {gene: i + 32 for i, gene in enumerate(GENES[30:])}
    processor = ScGPTProcessor.from_vocab(vocab, cls_value=-2.0)
    batch = processor(_counts(), GENES)
    assert (batch["input_ids"][:, 0] == 0).all()
    assert (batch["values"][:, 0] == -2).all()
    assert (batch["input_ids"][~batch["attention_mask"]] == 31).all()
    assert processor.genes == GENES


@pytest.mark.parametrize("ties", ["random", "midpoint", "upper", "lower"])
@pytest.mark.parametrize("max_tokens", [8, 1201])
def test_a_cell_gives_the_same_tokens_in_any_batch_order_or_storage(ties: str, max_tokens: int) -> None:
    processor = ScGPTProcessor.from_genes(GENES, ties=ties, max_tokens=max_tokens)
    counts, rng = _counts(), np.random.default_rng(1)
    expected = _rows(processor(counts, GENES))
    order, columns = rng.permutation(12), rng.permutation(60)
    moved = processor(csc_matrix(counts[order][:, columns].astype(int)), [GENES[i] for i in columns])
    assert _rows(moved) == [expected[cell] for cell in order]
    assert [_rows(processor(counts[i : i + 1], GENES))[0] for i in range(12)] == expected
    masked = processor(counts, GENES, mask_ratios=(0.5,))["labels"]
    single = processor(counts[3:4], GENES, mask_ratios=(0.5,))["labels"]
    assert torch.equal(masked[3, : single.shape[1]], single[0])


def test_midpoint_ties_do_not_depend_on_the_seed() -> None:
    processor = ScGPTProcessor.from_genes(GENES, ties="midpoint")
    first, other = (processor(_counts(), GENES, seed=seed, epoch=seed) for seed in (0, 9))
    assert torch.equal(first["values"], other["values"])
    random = ScGPTProcessor.from_genes(GENES)
    assert not torch.equal(random(_counts(), GENES)["values"], random(_counts(), GENES, epoch=1)["values"])


def test_a_call_of_tokenize_can_override_ties_and_max_tokens() -> None:
    processor, counts = ScGPTProcessor.from_genes(GENES, max_tokens=9), csr_matrix(_counts())
    other = ScGPTProcessor.from_genes(GENES, ties="upper", max_tokens=30)
    gene_ids = processor.match_genes(GENES)
    expected = other.tokenize(counts, gene_ids, seed=0, epoch=0)
    found = processor.tokenize(counts, gene_ids, seed=0, epoch=0, ties="upper", max_tokens=30)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.values.tolist() == expected.values.tolist()
    assert (processor.ties, processor.max_tokens) == ("random", 9)
    for wrong in ({"ties": "left"}, {"max_tokens": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            processor.tokenize(counts, gene_ids, seed=0, epoch=0, **wrong)


def test_random_numbers_depend_on_the_cell_ids() -> None:
    processor, counts = ScGPTProcessor.from_genes(GENES), np.repeat(_counts(n_cells=1), 3, axis=0)
    values = processor(counts, GENES, cell_ids=np.array([5, 6, 5]))["values"]
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[1])
    by_content = processor(counts, GENES)["values"]
    assert torch.equal(by_content[0], by_content[1])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), target_sum=st.floats(1, 1e6))
def test_bins_do_not_depend_on_target_sum(seed: int, target_sum: float) -> None:
    plain, other = (ScGPTProcessor.from_genes(GENES, target_sum=total) for total in (1e4, target_sum))
    assert torch.equal(plain(_counts(seed), GENES)["values"], other(_counts(seed), GENES)["values"])


def test_log1p_values_are_normalized_over_all_genes_of_the_data() -> None:
    processor = ScGPTProcessor.from_genes(GENES[:40], input_style="log1p", target_sum=100.0)
    counts = _counts()
    tokens = processor.tokenize(csr_matrix(counts), processor.match_genes(GENES), seed=0, epoch=0)
    expected = np.log1p(counts * 100 / counts.sum(1, keepdims=True))[:, :40]
    genes = tokens.input_ids != processor.cls_id
    cells = np.repeat(np.arange(12), np.diff(tokens.indptr))
    np.testing.assert_allclose(tokens.values[genes], expected[cells[genes], tokens.input_ids[genes]], rtol=1e-6)


def test_include_zeros_gives_every_known_gene_of_the_data() -> None:
    processor = ScGPTProcessor.from_genes(GENES, include_zeros=True)
    batch = processor(_counts(), GENES)
    assert batch["input_ids"].shape == (12, 61)
    np.testing.assert_array_equal(batch["values"][:, 1:].numpy() == 0, _counts() == 0)


def test_packed_and_padded_hold_the_same_tokens_and_labels() -> None:
    processor = ScGPTProcessor.from_genes(GENES)
    padded, packed = (processor(_counts(), GENES, mask_ratios=(0.25, 0.75), packed=flag) for flag in (False, True))
    for key in ("input_ids", "values", "labels"):
        assert torch.equal(padded[key][padded["attention_mask"]], packed[key][0])
    assert (packed["values"][packed["labels"] != IGNORE] == -1).all()


def test_mask_changes_each_epoch_and_never_masks_cls() -> None:
    processor = ScGPTProcessor.from_genes(GENES)
    tokens = processor.tokenize(csr_matrix(_counts()), processor.match_genes(GENES), seed=0, epoch=0)
    first, second, again = (processor.mask(tokens, seed=0, epoch=epoch) for epoch in (0, 1, 0))
    assert not np.array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.labels[first.indptr[:-1]] == IGNORE).all()


def test_gene_names_of_an_anndata_come_from_the_matching_column() -> None:
    var = pd.DataFrame({"feature_id": GENES}, index=[f"S{i}" for i in range(60)])
    processor = ScGPTProcessor.from_genes(GENES)
    expected = processor(_counts(), GENES)
    for counts in (_counts(), csr_matrix(_counts())):
        batch = processor(AnnData(counts, var=var))
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    named = processor(AnnData(_counts(), var=var), genes=GENES)
    assert torch.equal(named["values"], expected["values"])


def test_cells_without_known_genes_raise_or_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    processor, counts = ScGPTProcessor.from_genes(GENES), _counts()
    counts[[2, 7]] = 0
    with pytest.raises(ValueError, match=r"2 of 12 cells express no gene of the vocabulary, e.g. rows \[2, 7\]"):
        processor(counts, GENES)
    assert processor(counts, GENES, drop_empty=True)["input_ids"].shape[0] == 10
    gene_ids = processor.match_genes(GENES)
    with caplog.at_level(logging.DEBUG):
        tokens = processor.tokenize(csr_matrix(counts), gene_ids, cell_ids=np.arange(12), seed=0, epoch=0)
    assert tokens.cell_ids.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert "dropped 2 of 12 cells" in caplog.text
    n_known = processor.count_known(csr_matrix(counts), gene_ids)
    assert n_known.tolist() == (counts > 0).sum(1).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_counts(),), "gene names are missing"),
        ((_counts(), GENES[:-1]), r"found \(59,\) gene ids for 60 columns"),
        ((-_counts(), GENES), "finite expression ≥ 0"),
        ((_counts()[0], GENES), "shape"),
        ((_counts(), [f"S{i}" for i in range(60)]), "only 0 of the 60"),
    ],
)
def test_bad_counts_raise(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScGPTProcessor.from_genes(GENES)(*arguments)


@given(seed=st.integers(0, 99), include_zeros=st.booleans(), dtype=st.sampled_from([np.uint16, np.float32]))
def test_counts_of_columns_with_one_gene_are_summed(seed: int, include_zeros: bool, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    genes = [str(name) for name in rng.choice([*GENES[:20], "unknown"], 60)]  # most of them several times
    counts = np.minimum(rng.poisson(0.5, (30, 60)) * rng.choice([1, 40_000], (30, 60), p=[0.99, 0.01]), 60_000)
    names = list(dict.fromkeys(genes))
    summed = np.stack([counts[:, [gene == name for gene in genes]].sum(1) for name in names], axis=1)
    processor = ScGPTProcessor.from_genes(GENES, include_zeros=include_zeros)
    settings: dict[str, Any] = {"mask_ratios": (0.25, 0.75), "drop_empty": True}
    found, expected = processor(counts.astype(dtype), genes, **settings), processor(summed, names, **settings)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)
    block = csr_matrix(counts.astype(dtype))
    block.indices = block.indices.astype(dtype if dtype == np.uint16 else np.int32)
    n_known = processor.count_known(block, processor.match_genes(genes))
    assert n_known.tolist() == (summed[:, [name in GENES for name in names]] > 0).sum(1).tolist()


def test_summed_genes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    ScGPTProcessor.from_genes(GENES)(_counts(), [*GENES[:-1], GENES[0]])
    assert f"1 genes of the data have the name of another one, e.g. ['{GENES[0]}']; their counts are summed" in (
        caplog.text
    )


def test_bad_ids_raise() -> None:
    processor, counts = ScGPTProcessor.from_genes(GENES), csr_matrix(_counts())
    with pytest.raises(ValueError, match=r"found \(3,\) cell ids for 12 cells"):
        processor.tokenize(counts, np.arange(60), cell_ids=np.arange(3), seed=0, epoch=0)
    with pytest.raises(ValueError, match="gene id 63 is outside the vocabulary of 63"):
        processor.tokenize(counts, np.arange(60) + 4, seed=0, epoch=0)


def test_read_only_ids_are_checked_once_and_others_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, counts, calls = ScGPTProcessor.from_genes(GENES), csr_matrix(_counts()), []
    check = processing_scgpt.check_gene_ids
    monkeypatch.setattr(processing_scgpt, "check_gene_ids", lambda *args: calls.append(args) or check(*args))
    for read_only, n_calls in ((True, 1), (False, 3)):
        gene_ids = np.arange(60)
        gene_ids.flags.writeable = not read_only
        for _ in range(3):
            processor.tokenize(counts, gene_ids, seed=0, epoch=0)
        assert len(calls) == n_calls
        calls.clear()
    gene_ids[3] = 63
    gene_ids.flags.writeable = False
    with pytest.raises(ValueError, match="gene id 63 is outside the vocabulary"):
        processor.tokenize(counts, gene_ids, seed=0, epoch=0)
    checked = np.arange(60)
    view = checked[:]
    for ids in (checked, view):
        ids.flags.writeable = False
        processor.tokenize(counts, ids, seed=0, epoch=0)
    checked.flags.writeable = True
    checked[3] = 63
    for ids in (checked, view):
        with pytest.raises(ValueError, match="gene id 63 is outside the vocabulary"):
            processor.tokenize(counts, ids, seed=0, epoch=0)
    checked = np.arange(60)
    checked.flags.writeable = False
    processor.tokenize(counts, checked, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"found \(60,\) gene ids for 59 columns"):
        processor.tokenize(counts[:, :59], checked, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ties": "left"}, "unknown ties 'left'; choose one of random, midpoint"),
        ({"input_style": "raw"}, "unknown input_style 'raw'; choose one of binned, log1p"),
        ({"n_bins": 1}, "n_bins must be an integer ≥ 2, found 1"),
        ({"n_bins": 51.0}, "n_bins must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"max_tokens": 1}, "max_tokens must be an integer ≥ 2"),
        ({"cls_value": float("nan")}, "cls_value must be a finite number, found nan"),
        ({"pad_value": "-2"}, "pad_value must be a finite number"),
        ({"mask_value": None}, "mask_value must be a finite number"),
        ({"target_sum": 0}, "target_sum must be > 0"),
        ({"include_zeros": 1}, "include_zeros must be true or false"),
    ],
)
def test_bad_settings_raise(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScGPTProcessor.from_genes(GENES, **setting)


def test_misspelt_settings_raise() -> None:
    with pytest.raises(TypeError, match="n_bin"):
        ScGPTProcessor.from_genes(GENES, n_bin=51)


def test_a_saved_processor_loads_identical(tmp_path: Path) -> None:
    processor = ScGPTProcessor.from_genes(GENES, **SETTINGS)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert {key: saved[key] for key in SETTINGS} == SETTINGS
    for loaded in (ScGPTProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is ScGPTProcessor
        assert {key: getattr(loaded, key) for key in SETTINGS} == SETTINGS
        assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        first, second = processor(_counts(), GENES, mask_ratios=(0.5,)), loaded(_counts(), GENES, mask_ratios=(0.5,))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("processor_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((again / name).read_text())
    assert AutoTokenizer.from_pretrained(tmp_path)(" ".join(GENES))["input_ids"] == list(range(60))


def test_settings_can_be_changed_while_loading(tmp_path: Path) -> None:
    ScGPTProcessor.from_genes(GENES).save_pretrained(tmp_path)
    assert ScGPTProcessor.from_pretrained(tmp_path, ties="midpoint").ties == "midpoint"
    with pytest.raises(ValueError, match="n_bins must be"):
        ScGPTProcessor.from_pretrained(tmp_path, n_bins=0)


def test_an_unknown_saved_setting_raises(tmp_path: Path) -> None:
    ScGPTProcessor.from_genes(GENES).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ploidy": 2}))
    for load in (ScGPTProcessor, AutoProcessor):
        with pytest.raises(ValueError, match=r"unknown settings: \['ploidy'\]; a newer version"):
            load.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"vocab_size": 64, "pad_token_id": 60},
            "has {'vocab_size': 63, 'pad_token_id': 60}, but the model there has {'vocab_size': 64}",
        ),
        (
            {"vocab_size": 63, "pad_token_id": 0},
            "has {'vocab_size': 63, 'pad_token_id': 60}, but the model there has {'pad_token_id': 0}",
        ),
        (
            {"vocab_size": 63, "pad_token_id": 60, "value_encoder": "category", "n_bins": 11},
            "'n_bins': 51}, but the model there has {'n_bins': 11}",
        ),
    ],
)
def test_a_vocabulary_or_number_of_bins_that_differs_from_the_saved_model_raises(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    ScGPTProcessor.from_genes(GENES).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "scgpt", **config}))
    for load in (ScGPTProcessor, AutoProcessor):
        with pytest.raises(ValueError, match=rf"{message}; copy .* from the same folder"):
            load.from_pretrained(tmp_path)
    for fits in ({"vocab_size": 63, "pad_token_id": 60, "n_bins": 11}, {"vocab_size": 63, "pad_token_id": None}, {}):
        (tmp_path / "config.json").write_text(json.dumps(fits))
        assert ScGPTProcessor.from_pretrained(tmp_path).vocab_size == 63


def test_return_tensors_accepts_pytorch_only() -> None:
    processor = ScGPTProcessor.from_genes(GENES)
    explicit, plain = processor(_counts(), GENES, return_tensors="pt"), processor(_counts(), GENES)
    assert all(torch.equal(explicit[key], plain[key]) for key in plain)
    with pytest.raises(ValueError, match=r"return_tensors='np': .* PyTorch tensors; leave it out, or pass 'pt'"):
        processor(_counts(), GENES, return_tensors="np")
