"""Outputs and losses of the models; they depend on neither padding nor other cells, and load in every Auto class."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

import scgpt_hf
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel
from scgpt_hf.model.objectives_scgpt import IGNORE, contrastive_cells
from tests.support.models import EVERY_OBJECTIVE

Batch = dict[str, Any]

VARIANTS = [
    {},
    {"norm_scheme": "pre"},
    {"norm_scheme": "scgpt_pre", "gepc_query": "concat"},
    {"value_encoder": "category", "gepc_query": "sum"},
    {"value_encoder": "scaling", "cell_pooling": "weighted"},
    {"cell_pooling": "average", "input_norm": "batch"},
    {"input_norm": "domain", "n_domains": 3},
    {"loss_weights": {"gepc": 1.0}},
    {"loss_weights": {"gep": 1.0, "ecs": 10.0}},
    EVERY_OBJECTIVE,
]
OF_OTHER_DATA = [
    {"objective": "generative", "loss_weights": {"gep": 1.0, "gepc": 1.0, "gen": 1.0}},
    *({"modalities": ["RNA", "<pad>", "<cls>"], "modality_embedding": place} for place in ("decoder", "input", "both")),
]
AUTO_CLASSES = {
    AutoModel: ScGPTModel,
    AutoModelForPreTraining: ScGPTForPreTraining,
    AutoModelForMaskedLM: ScGPTForPreTraining,
    AutoModelForSequenceClassification: ScGPTForSequenceClassification,
}


def encoder_input(batch: Batch) -> Batch:
    targets = ("labels", "class_labels", "count_ids", "count_values", "count_cells")
    return {name: value for name, value in batch.items() if name not in targets and not name.startswith("view_")}


def fit_values(batch: Batch, variant: Batch) -> Batch:
    if variant.get("value_encoder") != "category":
        return batch
    values = batch["values"].masked_fill(batch["values"] == -2, 51).masked_fill(batch["values"] == -1, 52)
    return {**batch, "values": values}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_is_the_weighted_sum_and_trains_every_weight(model: Any, padded: Batch, variant: Batch) -> None:
    network = model(**variant).train()
    output = network(**fit_values(padded, variant))
    weights = network.config.loss_weights
    assert set(output.losses) == {name for name in weights if weights[name]}
    torch.testing.assert_close(output.loss, sum(weights[name] * value for name, value in output.losses.items()))
    output.loss.backward()
    # Distributed training raises for a parameter without a gradient.
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_an_objective_of_weight_0_is_not_computed_and_has_no_head(model: Any, padded: Batch) -> None:
    network = model(loss_weights={"gep": 1.0, "gepc": 0})
    output = network(**padded)
    assert set(output.losses) == {"gep"}
    assert output.gepc is None
    assert network.cell_to_gene_head is None


@pytest.mark.parametrize("attention", ["eager", "sdpa", "scgpt_varlen"])
@pytest.mark.parametrize("variant", [{}, {"norm_scheme": "pre"}, EVERY_OBJECTIVE], ids=str)
def test_a_cell_does_not_depend_on_padding_or_other_cells(
    model: Any, padded: Batch, attention: str, variant: Batch
) -> None:
    network, batch = model(attention, **variant).eval(), encoder_input(padded)
    together = network(**batch)
    for cell, real in enumerate(padded["attention_mask"]):
        single = network(
            **{name: value[[cell]][:, real] if value.dim() > 1 else value[[cell]] for name, value in batch.items()}
        )
        torch.testing.assert_close(single.gep[0], together.gep[cell][real], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(single.gepc[0], together.gepc[cell][real], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(single.cell_embedding[0], together.cell_embedding[cell], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "scgpt_varlen"])
def test_padding_is_not_read(model: Any, padded: Batch, attention: str) -> None:
    network, batch = model(attention).eval(), encoder_input(padded)
    before = network(**batch).cell_embedding
    other = {**batch, "values": batch["values"].masked_fill(~batch["attention_mask"], 33.0)}
    assert torch.equal(network(**other).cell_embedding, before)
    unmasked = {**batch, "attention_mask": None}
    assert not torch.allclose(network(**unmasked).cell_embedding, before)


def test_the_order_of_genes_does_not_matter(model: Any, padded: Batch) -> None:
    network, batch = model().eval(), encoder_input(padded)
    shuffled = dict(batch)
    order = torch.tensor([0, 4, 2, 1, 3, *range(5, batch["values"].shape[1])])
    for name in ("input_ids", "values", "attention_mask"):
        shuffled[name] = batch[name][:, order]
    torch.testing.assert_close(network(**shuffled).cell_embedding[0], network(**batch).cell_embedding[0])


@pytest.mark.parametrize("variant", [{}, EVERY_OBJECTIVE], ids=str)
def test_label_positions_select_from_all_predictions(model: Any, padded: Batch, variant: Batch) -> None:
    network = model(**variant).eval()
    positions = (padded["labels"] != IGNORE).flatten().nonzero()[:, 0]
    everywhere, selected = network(**padded), network(**padded, label_positions=positions)
    for name in ("gep", "gepc", "gep_zero", "gepc_zero"):
        if name in everywhere:
            torch.testing.assert_close(selected[name], everywhere[name].flatten()[positions])
    torch.testing.assert_close(selected.loss, everywhere.loss)


def test_parts_of_a_batch_add_up_to_its_loss(model: Any, padded: Batch) -> None:
    network = model(loss_weights={"gep": 1.0, "gepc": 2.0}).eval()
    n_labels = (padded["labels"] != IGNORE).sum()
    parts = [{name: value[part] for name, value in padded.items()} for part in (slice(3), slice(3, 4))]
    total = sum(network(**part, num_items_in_batch=n_labels).loss for part in parts)
    torch.testing.assert_close(total, network(**padded).loss)


def test_a_batch_without_masked_genes_has_loss_0(model: Any, padded: Batch) -> None:
    network = model().train()
    nothing = torch.full_like(padded["labels"], IGNORE)
    for positions in (None, torch.zeros(0, dtype=torch.int64)):
        output = network(**{**padded, "labels": nothing}, label_positions=positions)
        assert output.loss == 0
        output.loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in network.parameters())


def test_the_contrastive_loss_uses_a_second_pass(model: Any, padded: Batch) -> None:
    network = model(loss_weights={"cce": 1.0}, dropout=0.5)
    for in_training in (True, False):
        output = network.train(in_training)(**padded)
        with_itself = contrastive_cells(output.cell_embedding, output.cell_embedding, network.config.cce_temperature)
        assert torch.allclose(output.loss, with_itself) != in_training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_does_not_change_gradients(model: Any, padded: Batch, packed: Batch) -> None:
    for batch in (padded, packed):
        found = []
        for checkpointing in (False, True):
            network = model(norm_scheme="post").train()
            if checkpointing:
                network.gradient_checkpointing_enable()
            loss = network(**batch).loss
            loss.backward()
            found.append((loss, [parameter.grad for parameter in network.parameters()]))
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_hidden_states_and_attentions_are_recorded(model: Any, request: Any, layout: str) -> None:
    batch = encoder_input(request.getfixturevalue(layout))
    output = model("eager")(**batch, output_hidden_states=True, output_attentions=True)
    rows, tokens = batch["input_ids"].shape
    assert [state.shape for state in output.hidden_states] == [(rows, tokens, 16)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [weights.shape for weights in output.attentions] == [(rows, 2, tokens, tokens)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(rows, 2, tokens))


def test_return_dict_false_returns_the_same_as_a_tuple(model: Any, padded: Batch) -> None:
    network = model().eval()
    as_tuple, output = network(**padded, return_dict=False), network(**padded)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)
    assert len(as_tuple) == len(output.to_tuple())


def test_a_bfloat16_model_has_float32_losses(model: Any, padded: Batch) -> None:
    output = model().bfloat16()(**padded)
    assert output.last_hidden_state.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32


@pytest.mark.parametrize("saved", [ScGPTForPreTraining, ScGPTForSequenceClassification])
@pytest.mark.parametrize("auto", AUTO_CLASSES, ids=lambda auto: auto.__name__)
def test_every_auto_class_loads_every_checkpoint(
    config: Callable[..., Any], padded: Batch, tmp_path: Path, saved: Any, auto: Any
) -> None:
    assert scgpt_hf.ScGPTModel is ScGPTModel  # the package is imported, so the Auto classes know ours
    network = saved(config(**EVERY_OBJECTIVE)).eval()
    network.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is AUTO_CLASSES[auto]
    base = loaded if isinstance(loaded, ScGPTModel) else loaded.scgpt
    for name, tensor in network.scgpt.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]), name
    if type(loaded) is saved:
        batch = encoder_input(padded)
        for before, after in zip(network(**batch).to_tuple(), loaded(**batch).to_tuple(), strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("variant", [*VARIANTS, *OF_OTHER_DATA], ids=str)
def test_saved_weights_are_loaded_bit_by_bit(config: Callable[..., Any], tmp_path: Path, variant: Batch) -> None:
    saved = ScGPTForPreTraining(config(**variant))
    saved.save_pretrained(tmp_path)
    loaded, report = ScGPTForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_missing_weights_are_initialized(config: Callable[..., Any], tmp_path: Path) -> None:
    settings = config(gepc_query="sum", n_domains=3)
    ScGPTModel(settings).save_pretrained(tmp_path)
    loaded = ScGPTForPreTraining.from_pretrained(tmp_path, input_norm="domain")
    for network in (loaded, ScGPTForPreTraining(settings)):
        assert network.cell_to_gene_head.activation.weight == 0.25
        assert 0.2 < network.cell_to_gene_head.query.weight.abs().max() <= 1 / 4
        assert 0.05 < network.scgpt.gene_encoder.embedding.weight.abs().max() <= 0.1
    assert loaded.scgpt.input_norm.running_var.eq(1).all()


def test_classification_computes_the_loss_of_the_problem(
    config: Callable[..., Any], padded: Batch, packed: Batch
) -> None:
    network = ScGPTForSequenceClassification(config(num_labels=3))
    for batch in (padded, packed):
        output = network(**{**encoder_input(batch), "labels": padded["class_labels"]})
        expected = torch.nn.functional.cross_entropy(output.logits, padded["class_labels"])
        torch.testing.assert_close(output.loss, expected)
    regression = ScGPTForSequenceClassification(config(num_labels=1))
    output = regression(**encoder_input(padded), labels=torch.ones(4))
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - 1).square().mean())
    several = ScGPTForSequenceClassification(config(num_labels=3, problem_type="multi_label_classification"))
    assert several(**encoder_input(padded), labels=torch.ones(4, 3)).loss > 0
    assert several(**encoder_input(padded)).loss is None


def test_generation_depends_on_the_cell_embedding_only(model: Any, padded: Batch) -> None:
    network, batch = model().eval(), encoder_input(padded)
    cells = torch.randn(4, 16)
    found = network(**{**batch, "values": None}, input_cell_embedding=cells).gep
    other = {**batch, "values": None, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 0] = 3
    torch.testing.assert_close(network(**other, input_cell_embedding=cells).gep, found)
    assert not torch.allclose(network(**{**batch, "values": None}, input_cell_embedding=cells + 1).gep, found)
    average = model(cell_pooling="weighted").eval()
    assert average(**{**batch, "values": None}, input_cell_embedding=cells).cell_embedding.shape == (4, 16)


def test_batches_have_the_argument_names_of_forward(padded: Batch, packed: Batch) -> None:
    accepted = set(inspect.signature(ScGPTForPreTraining.forward).parameters)
    assert set(padded) | set(packed) <= accepted


@pytest.mark.parametrize(
    ("variant", "batch", "message"),
    [
        ({}, {"values": None}, "values are missing"),
        ({}, {"values": torch.zeros(2, 3)}, "differ in shape"),
        ({"loss_weights": {"cls": 1.0}}, {"class_labels": None}, "class_labels are missing"),
        ({"domain_head": True, "n_domains": 3}, {"domain_ids": None}, "domain_ids are missing"),
        ({"domain_embedding": True, "n_domains": 3}, {"domain_ids": None}, "domain_ids are missing"),
        ({"input_norm": "domain", "n_domains": 3}, {"domain_ids": None}, "domain_ids are missing"),
    ],
)
def test_missing_inputs_raise(model: Any, padded: Batch, variant: Batch, batch: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**variant)(**{**padded, **batch})


@pytest.mark.parametrize(
    "setting", [{"cell_pooling": "average"}, {"cell_pooling": "weighted"}, {"input_norm": "batch"}]
)
def test_packed_input_raises_if_the_config_depends_on_padding(model: Any, packed: Batch, setting: Batch) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* depends on padding"):
        model(**setting)(**packed)


def test_a_model_without_objectives_raises(model: Any) -> None:
    with pytest.raises(ValueError, match="weight above 0"):
        model(loss_weights={"gep": 0})


def test_an_unsupported_attention_raises(model: Any) -> None:
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="does not support"):
            model(name)
