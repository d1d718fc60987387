"""Batches: the perturbed gene is always a token, and all layouts hold the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPerturbation
from scgpt_hf.perturbation.batches import Example, keep_genes, make_batch, nameless_id
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

PROCESSOR = ScGPTProcessor.from_genes([f"G{number}" for number in range(9)], pad_value=0.0)
MEASURED = np.arange(6)  # genes 6, 7, 8 are not measured


def config(**settings_of_model: object) -> ScGPTConfig:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "dropout": 0.0}
    ids = {"vocab_size": PROCESSOR.vocab_size, "pad_token_id": PROCESSOR.pad_id}
    return ScGPTConfig(**ids, **sizes, loss_weights={"gep": 1.0}, **settings_of_model)


@settings(deadline=None)
@given(st.sets(st.integers(0, 8), min_size=1, max_size=3), st.booleans(), st.integers(1, 6))
def test_a_perturbed_gene_is_always_a_token(targets: set[int], with_cls: bool, n_kept: int) -> None:
    wanted = np.array(sorted(targets))
    words = np.random.default_rng(0).integers(0, 2**63, 6).astype(np.uint64)
    kept = keep_genes(words, np.isin(MEASURED, wanted), max(n_kept, len(targets)))
    example = Example(np.zeros(6, np.float32), wanted, np.ones(6, np.float32), kept)
    batch, (place,) = make_batch([example], MEASURED, PROCESSOR, config(perturbation_cls=with_cls))
    ids, flags = batch["input_ids"][0].numpy(), batch["perturbation_flags"][0].numpy()
    assert sorted(ids[flags == 1]) == sorted(targets)
    assert (ids[0] == PROCESSOR.cls_id) == with_cls
    assert (ids[place] == MEASURED[kept]).all()
    labels = batch["labels"][0].numpy()
    assert (labels[place] == 1).all()
    assert (np.delete(labels, place) == IGNORE).all()


def test_packed_padded_and_single_examples_give_the_same_predictions() -> None:
    torch.manual_seed(0)
    values = np.random.default_rng(0).random((2, 6)).astype(np.float32)
    examples = [Example(values[0], np.array([1])), Example(values[1], np.array([2, 7, 8]))]
    model = ScGPTForPerturbation(config(perturbation_sum=True)).eval()
    for layer in (model.expression_head.coefficient[-1], model.expression_head.bias[-1]):
        layer.reset_parameters()
    found = {}
    for name, settings_of_model in (("packed", {}), ("padded", {"cell_pooling": "average"})):
        batch, places = make_batch(examples, MEASURED, PROCESSOR, config(**settings_of_model))
        assert ("cu_seq_lens_q" in batch) == (name == "packed")
        found[name] = [model(**batch).expression.flatten()[place] for place in places]
    found["alone"] = []
    for example in examples:
        batch, (place,) = make_batch([example], MEASURED, PROCESSOR, config())
        found["alone"].append(model(**batch).expression.flatten()[place])
    for name in ("packed", "padded"):
        for one, other in zip(found[name], found["alone"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_kept_genes_are_the_targets_and_the_smallest_words() -> None:
    words = np.array([5, 1, 9, 3], np.uint64)
    assert keep_genes(words, np.array([False, False, True, False]), 2).tolist() == [1, 2]
    assert keep_genes(words, np.zeros(4, bool), 9).tolist() == [0, 1, 2, 3]


def test_a_hidden_name_is_no_gene() -> None:
    assert PROCESSOR.gene_names([nameless_id(PROCESSOR)]) == ["<eoc>"]


@pytest.mark.parametrize("n_examples", [1, 3])
def test_examples_of_equal_length_need_no_mask(n_examples: int) -> None:
    examples = [Example(np.zeros(6, np.float32), np.array([number])) for number in range(n_examples)]
    batch, _ = make_batch(examples, MEASURED, PROCESSOR, config())
    assert set(batch) == {"input_ids", "values", "perturbation_flags"}
    assert batch["input_ids"].shape == (n_examples, 7)
