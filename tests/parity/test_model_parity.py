"""Converted weights of scGPT's code give its outputs, losses, gradients, batch statistics and training steps.

The tensors come from running scGPT's code. `shared/fixtures/scgpt_parity/README.md` describes them and justifies the
tolerances.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from scgpt_hf.conversion.checkpoint import convert_scgpt
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTForPreTrainingOutput
from scgpt_hf.model.objectives_scgpt import (
    IGNORE,
    bernoulli_nll,
    contrastive_cells,
    elastic_cell_similarity,
    masked_mse,
)
from tests.support.parity import CASES, assert_matches, switches_of

Tensors = dict[str, torch.Tensor]

NEEDS_PADDING = ("dsbn_seed_config", "batchnorm_plain", "pool_avg", "pool_weighted", "ecs_threshold_08")
PACKABLE = tuple(case for case in CASES if case not in NEEDS_PADDING)


class Case(NamedTuple):
    """One network of scGPT's code, converted."""

    model: ScGPTForPreTraining
    converted: dict[str, str]
    batch: Tensors
    inputs: Tensors
    expected: Tensors
    real: torch.Tensor


def load_case(folder: Path, attention: str = "eager", weights_file: str = "best_model.pt") -> Case:
    """Convert the weights of a case, and read its batch and the outputs of scGPT's code."""
    made = json.loads((folder / "case.json").read_text())["constructor"]
    expected = load_file(folder / "outputs.safetensors")
    model, _, report = convert_scgpt(folder, weights_file=weights_file, **switches_of(made))
    assert not report.left_out
    objectives = {"loss_ecs": {"ecs": 10.0}, "loss_cls": {"cls": 1.0}}
    for loss, weight in objectives.items():
        model.config.loss_weights |= weight if loss in expected else {}
    model.set_attn_implementation(attention)
    inputs = load_file(folder / "inputs.safetensors")
    labels = inputs["target_values"].masked_fill(~inputs["masked_positions"], IGNORE)
    batch = {
        "input_ids": inputs["gene_ids"],
        "values": inputs["values"],
        "attention_mask": ~inputs["padding_mask"],
        "labels": labels,
        "domain_ids": inputs["batch_labels"],
        "class_labels": inputs["celltype_labels"],
    }
    return Case(model, report.converted, batch, inputs, expected, ~inputs["padding_mask"])


def pack(batch: Tensors) -> dict[str, Any]:
    """Return a padded batch in the packed layout."""
    real = batch["attention_mask"]
    offsets = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    packed: dict[str, Any] = {name: batch[name][real][None] for name in ("input_ids", "values", "labels")}
    packed |= {name: batch[name] for name in ("domain_ids", "class_labels")}
    longest = int(real.sum(1).max())
    return packed | {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def check_outputs(case: Case, output: ScGPTForPreTrainingOutput, atol: float, *, packed: bool) -> None:
    def at_tokens(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0] if packed else tensor[case.real]

    expected = case.expected
    assert_matches(at_tokens(output.gep), expected["mlm_output"][case.real], atol)
    assert_matches(at_tokens(output.gepc), expected["mvc_output"][case.real], atol)
    assert_matches(output.cell_embedding, expected["cell_emb"], atol)
    for ours, theirs in ((output.gep_zero, "mlm_zero_probs"), (output.gepc_zero, "mvc_zero_probs")):
        if theirs in expected:
            assert_matches(at_tokens(ours).sigmoid(), expected[theirs][case.real])
    for ours, theirs in ((output.class_logits, "cls_output"), (output.dar, "dab_output")):
        if theirs in expected:
            assert_matches(ours, expected[theirs])
    if "last_hidden_state" in expected:
        assert_matches(at_tokens(output.last_hidden_state), expected["last_hidden_state"][case.real], atol)


def check_losses(case: Case, output: ScGPTForPreTrainingOutput) -> None:
    names = {"gep": "gep", "gepc": "gepc", "gep_zero": "gep_zero", "gepc_zero": "gepc_zero", "ecs": "ecs"}
    names |= {"cls": "cls", "dar": "dab"}
    assert {names[name] for name in output.losses} == {
        name.removeprefix("loss_") for name in case.expected if name.startswith("loss_")
    } - {"total", "cce"}
    for name, value in output.losses.items():
        assert_matches(value, case.expected[f"loss_{names[name]}"])
    assert_matches(output.loss, case.expected["loss_total"], atol=1e-4)


def check_gradients(case: Case, prefix: str) -> None:
    ours = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    theirs = {name.removeprefix(prefix): grad for name, grad in case.expected.items() if name.startswith(prefix)}
    for name, gradient in theirs.items():
        assert_matches(ours.pop(case.converted[name]), gradient, atol=2e-4)


LAYOUTS = [
    *((case, attention, False) for case in CASES for attention in ("eager", "sdpa")),
    *((case, attention, True) for case in PACKABLE for attention in ("eager", "sdpa", "scgpt_varlen")),
]


@pytest.mark.parametrize(("name", "attention", "packed"), LAYOUTS)
def test_outputs_losses_and_gradients_equal_the_original(
    fixtures: Path, name: str, attention: str, packed: bool
) -> None:
    case = load_case(fixtures / name, attention)
    batch = pack(case.batch) if packed else case.batch
    output = case.model(**batch)
    check_outputs(case, output, 2e-4 if name == "scaling_values" else 2e-5, packed=packed)
    if "loss_total" not in case.expected:
        return
    check_losses(case, output)
    output.loss.backward(retain_graph=True)
    check_gradients(case, "grad.")
    if "grad_global_norm" in case.expected:
        norm = torch.nn.utils.get_total_norm([p.grad for p in case.model.parameters() if p.grad is not None])
        assert_matches(norm, case.expected["grad_global_norm"], atol=2e-4)
    case.model.zero_grad()
    output.losses["gepc"].backward()
    check_gradients(case, "grad_gepc.")


@pytest.mark.parametrize("name", [case for case in CASES if case != "scaling_values"])
def test_label_positions_give_the_same_losses(fixtures: Path, name: str) -> None:
    case = load_case(fixtures / name)
    positions = case.inputs["masked_positions"].flatten().nonzero()[:, 0]
    output = case.model(**case.batch, label_positions=positions)
    check_losses(case, output)
    assert_matches(output.gep, case.expected["mlm_output"].flatten()[positions])


@pytest.mark.parametrize("name", CASES)
def test_the_contrastive_loss_of_two_equal_passes_equals_the_original(fixtures: Path, name: str) -> None:
    case = load_case(fixtures / name)
    if "loss_cce" in case.expected:
        cells = case.model(**case.batch).cell_embedding
        assert_matches(contrastive_cells(cells, cells, case.model.config.cce_temperature), case.expected["loss_cce"])


@pytest.mark.parametrize("file", ["best_model.flash_direct.pt", "best_model.flash_wrapped.pt"])
def test_every_layout_of_keys_gives_the_same_network(fixtures: Path, file: str) -> None:
    folder = fixtures / "base_continuous"
    same = load_case(folder).model.state_dict()
    for name, tensor in load_case(folder, weights_file=file).model.state_dict().items():
        assert torch.equal(tensor, same[name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_five_training_steps_equal_the_original(fixtures: Path, packed: bool) -> None:
    case = load_case(fixtures / "base_continuous", "scgpt_varlen")
    batch = pack(case.batch) if packed else case.batch
    optimizer = torch.optim.Adam(case.model.parameters(), lr=1e-3)
    for loss, norm in zip(case.expected["train_trace_loss"], case.expected["train_trace_gradnorm"], strict=True):
        optimizer.zero_grad()
        found = case.model(**batch).loss
        found.backward()
        found_norm = torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
        optimizer.step()
        torch.testing.assert_close((found, found_norm), (loss, norm), atol=0, rtol=1e-4)


@pytest.mark.parametrize("name", ["dsbn_seed_config", "batchnorm_plain"])
def test_batch_norm_in_training_equals_the_original(fixtures: Path, name: str) -> None:
    case = load_case(fixtures / name)
    case.model.scgpt.input_norm.train()
    output = case.model(**case.batch)
    assert_matches(output.gep[case.real], case.expected["train_mode_mlm_output"][case.real])
    if "train_mode_cell_emb" in case.expected:
        assert_matches(output.cell_embedding, case.expected["train_mode_cell_emb"])
    domain = case.batch["domain_ids"][0]
    norm = case.model.scgpt.input_norm
    for statistic in ("running_mean", "running_var", "num_batches_tracked"):
        if f"train_mode_{statistic}" in case.expected:
            found = getattr(norm, statistic)
            assert_matches(
                found[domain] if name == "dsbn_seed_config" else found, case.expected[f"train_mode_{statistic}"]
            )


@pytest.mark.parametrize("packed", [False, True])
def test_generation_from_a_cell_embedding_equals_the_original(fixtures: Path, packed: bool) -> None:
    case = load_case(fixtures / "generate_from_cell_emb")
    for values, expected in ((case.batch["values"], "generate_with_values"), (None, "generate_no_values")):
        batch = case.batch if not packed else pack(case.batch)
        batch = {**batch, "values": batch["values"] if values is not None else None, "labels": None}
        found = case.model(**batch, input_cell_embedding=case.inputs["input_cell_emb"]).gep
        assert_matches(found[0] if packed else found[case.real], case.expected[expected][case.real])


def test_objectives_equal_the_original(fixtures: Path) -> None:
    given = load_file(fixtures / "losses" / "losses.safetensors")
    labels = given["target"].masked_fill(~given["mask"], IGNORE)
    predicted = given["pred"].clone().requires_grad_()
    loss = masked_mse(predicted, labels)
    loss.backward()
    assert_matches(loss, given["masked_mse"])
    assert_matches(predicted.grad, given["masked_mse_grad"])

    probability = given["zero_probs"].clone().requires_grad_()
    loss = bernoulli_nll(torch.logit(probability), labels)
    loss.backward()
    assert_matches(loss, given["neg_log_bernoulli"])
    assert_matches(probability.grad, given["neg_log_bernoulli_grad"])

    for threshold in ("0.0", "0.3", "0.8"):
        assert_matches(elastic_cell_similarity(given["ecs_cell_emb"], float(threshold)), given[f"ecs_{threshold}"])
    assert_matches(contrastive_cells(given["cce_cell_emb_1"], given["cce_cell_emb_2"], 0.5), given["cce_loss"])

    with_cls = given["target_cls_zero"].masked_fill(~given["mask_cls_included"], IGNORE)
    assert_matches(masked_mse(given["pred"], with_cls), given["masked_mse_cls_included"])
