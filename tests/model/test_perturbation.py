"""The perturbation model: what a new one predicts, what flags do, layouts, losses, saving and loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForTokenClassification

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.embeddings_scgpt import PADDING, PERTURBED
from scgpt_hf.model.heads_scgpt import ConstantStart
from scgpt_hf.model.modeling_scgpt import ScGPTForPerturbation, ScGPTForPreTraining
from scgpt_hf.model.objectives_scgpt import IGNORE

Batch = dict[str, Any]


@pytest.fixture
def make(config: Callable[..., ScGPTConfig]) -> Callable[..., ScGPTForPerturbation]:
    def build(**settings: Any) -> ScGPTForPerturbation:
        torch.manual_seed(0)
        return ScGPTForPerturbation(config(**settings)).eval()

    return build


def with_flags(batch: Batch) -> Batch:
    """Return the tokens of a batch, the second gene of each cell perturbed."""
    names = ("input_ids", "values", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    flags = torch.zeros_like(batch["input_ids"])
    if "attention_mask" in batch:
        flags = flags.masked_fill(~batch["attention_mask"], PADDING)
        flags[batch["attention_mask"][:, 1], 1] = PERTURBED
    else:
        starts = batch["cu_seq_lens_q"].long()
        flags[0, starts[:-1][starts.diff() > 1] + 1] = PERTURBED
    return {name: batch[name] for name in names if name in batch} | {"perturbation_flags": flags}


def randomize(model: ScGPTForPerturbation) -> ScGPTForPerturbation:
    """Give the head random last layers; new ones predict no change."""
    for layer in model.modules():
        if isinstance(layer, ConstantStart):
            layer.reset_parameters()
    return model


def test_a_new_model_predicts_no_change(make: Callable[..., ScGPTForPerturbation], padded: Batch) -> None:
    batch = with_flags(padded)
    assert torch.equal(make()(**batch).expression, batch["values"])


def test_the_prediction_is_coefficient_times_value_plus_bias(
    make: Callable[..., ScGPTForPerturbation], padded: Batch
) -> None:
    model, batch = randomize(make()), with_flags(padded)
    found = model(**batch)
    states = found.last_hidden_state
    coefficient, bias = (
        layers(states)[..., 0] for layers in (model.expression_head.coefficient, model.expression_head.bias)
    )
    torch.testing.assert_close(found.expression, coefficient * batch["values"] + bias)


@pytest.mark.parametrize("perturbation_sum", [False, True])
def test_packed_equals_padded(
    make: Callable[..., ScGPTForPerturbation], padded: Batch, packed: Batch, perturbation_sum: bool
) -> None:
    model, real = randomize(make(perturbation_sum=perturbation_sum)), padded["attention_mask"]
    one, other = model(**with_flags(padded)), model(**with_flags(packed))
    for name in ("expression", "gepc"):
        torch.testing.assert_close(one[name][real], other[name][0][: int(real.sum())], atol=1e-5, rtol=1e-4)


def test_the_flag_of_one_gene_changes_all_genes_of_its_cell_only(
    make: Callable[..., ScGPTForPerturbation], padded: Batch
) -> None:
    model, batch = randomize(make()), with_flags(padded)
    changed = batch | {"perturbation_flags": batch["perturbation_flags"].clone()}
    changed["perturbation_flags"][1, 1] = 0
    difference = (model(**batch).expression - model(**changed).expression).abs()
    assert (difference[1][batch["attention_mask"][1]] > 0).all()
    assert not difference[[0, 2, 3]].any()


def test_new_flags_leave_the_encoder_as_it_was(make: Callable[..., ScGPTForPerturbation], padded: Batch) -> None:
    model, batch = make(), with_flags(padded)
    flags = batch.pop("perturbation_flags")
    unperturbed = model(**batch, perturbation_flags=torch.where(flags == PERTURBED, 0, flags))
    assert torch.equal(unperturbed.last_hidden_state, model.scgpt(**batch).last_hidden_state)


def test_the_vectors_of_perturbed_genes_are_summed_for_each_cell(
    make: Callable[..., ScGPTForPerturbation], padded: Batch
) -> None:
    model, batch = make(perturbation_sum=True), with_flags(padded)
    flags = batch["perturbation_flags"]
    flags[1, 2] = PERTURBED
    found = model._sum_perturbed(batch["input_ids"], flags, model._cell_of_token(batch["input_ids"], None))
    for cell in range(len(flags)):
        vectors = model.scgpt.gene_encoder(batch["input_ids"][cell][flags[cell] == PERTURBED])
        expected = model.perturbation_encoder(vectors).sum(0)
        torch.testing.assert_close(found[cell], expected.expand_as(found[cell]))


def test_losses_are_the_squared_error_and_its_parts_add_up(
    make: Callable[..., ScGPTForPerturbation], padded: Batch
) -> None:
    model, batch = randomize(make(loss_weights={"gep": 1.0, "gepc": 0.5, "ecs": 2.0})), with_flags(padded)
    labels = padded["labels"]
    found = model(**batch, labels=labels)
    known = labels != IGNORE
    torch.testing.assert_close(found.losses["gep"], (found.expression - labels)[known].square().mean())
    total = found.losses["gep"] + 0.5 * found.losses["gepc"] + 2 * found.losses["ecs"]
    torch.testing.assert_close(found.loss, total)
    found.loss.backward()
    without = [name for name, one in model.named_parameters() if one.grad is None]
    assert not without


def test_parts_of_a_batch_add_up_to_its_loss(make: Callable[..., ScGPTForPerturbation], padded: Batch) -> None:
    model, batch = randomize(make(loss_weights={"gep": 1.0})), with_flags(padded) | {"labels": padded["labels"]}
    n_labels = int((padded["labels"] != IGNORE).sum())
    parts = [{name: one[rows] for name, one in batch.items()} for rows in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(
        sum(model(**part, num_items_in_batch=n_labels).loss for part in parts), model(**batch).loss
    )


def test_a_saved_model_loads_with_its_auto_class_and_as_an_encoder(
    make: Callable[..., ScGPTForPerturbation], padded: Batch, tmp_path: Path
) -> None:
    model, batch = randomize(make(total_key="n_counts_full")), with_flags(padded)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is ScGPTForPerturbation
    assert loaded.config.total_key == "n_counts_full"
    assert torch.equal(loaded(**batch).expression, model(**batch).expression)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(one, model.scgpt.state_dict()[name]) for name, one in encoder.state_dict().items())


def test_a_pretrained_model_gets_a_new_head_that_predicts_no_change(
    config: Callable[..., ScGPTConfig], padded: Batch, tmp_path: Path
) -> None:
    ScGPTForPreTraining(config()).save_pretrained(tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    batch = with_flags(padded)
    assert torch.equal(model(**batch).expression, batch["values"])
    assert not model.flag_encoder.weight[[0, 2]].any()
    assert model.flag_encoder.weight[PERTURBED].std() > 0.5


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"value_encoder": "category"}, "value_encoder='category'"),
        ({"domain_embedding": True, "n_domains": 2}, "domain_embedding=True"),
    ],
)
def test_configs_that_cannot_predict_a_perturbation_raise(
    make: Callable[..., ScGPTForPerturbation], settings: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        make(**settings)


def test_missing_flags_raise(make: Callable[..., ScGPTForPerturbation], padded: Batch) -> None:
    batch = with_flags(padded)
    del batch["perturbation_flags"]
    with pytest.raises(ValueError, match="perturbation_flags"):
        make()(**batch)
