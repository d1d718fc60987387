"""Checkpoints of scGPT's code convert, save and load with the Auto classes."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification, AutoProcessor

from scgpt_hf.conversion.checkpoint import convert_scgpt, save_converted
from tests.support import ROOT
from tests.support.original_scgpt import Original, forward
from tests.support.parity import CASES, assert_matches, switches_of

SCRIPT = ROOT / "scripts" / "convert.py"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the arguments of the constructor, the batch for our models, and the outputs of scGPT's code."""
    made = json.loads((folder / "case.json").read_text())["constructor"]
    inputs = load_file(folder / "inputs.safetensors")
    batch = {"input_ids": inputs["gene_ids"], "values": inputs["values"], "attention_mask": ~inputs["padding_mask"]}
    batch["domain_ids"] = inputs.get("batch_labels", torch.zeros(len(inputs["values"]), dtype=torch.int64))
    return made, batch, load_file(folder / "outputs.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_saved_case_gives_the_originals_numbers_in_every_auto_class(
    fixtures: Path, name: str, tmp_path: Path
) -> None:
    made, batch, expected = read(fixtures / name)
    atol = 2e-4 if name == "scaling_values" else 2e-5
    real = batch["attention_mask"]
    out = save_converted(*convert_scgpt(fixtures / name, **switches_of(made)), tmp_path / name)
    with torch.no_grad():
        found = AutoModelForPreTraining.from_pretrained(out)(**batch)
        cells = AutoModel.from_pretrained(out)(**batch).cell_embedding
        logits = AutoModelForSequenceClassification.from_pretrained(out)(**batch).logits
    assert_matches(found.gep[real], expected["mlm_output"][real], atol)
    assert_matches(found.gepc[real], expected["mvc_output"][real], atol)
    assert_matches(cells, expected["cell_emb"], atol)
    assert logits.shape[1] == made["n_cls"]
    if "cls_output" in expected:
        assert_matches(logits, expected["cls_output"], atol)
    processor = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.get_vocab() == json.loads((fixtures / name / "vocab.json").read_text())
    args = json.loads((fixtures / name / "args.json").read_text())
    assert processor.cls_value == processor.pad_value == args["pad_value"]
    assert (processor.mask_value, processor.n_bins) == (args["mask_value"], args["n_bins"])


@pytest.mark.parametrize("name", CASES)
def test_settings_inferred_from_keys_equal_those_of_the_constructor(fixtures: Path, name: str) -> None:
    made = read(fixtures / name)[0]
    inferred = convert_scgpt(fixtures / name)[2].inferred
    norm = {False: "none", True: "domain", "batchnorm": "batch"}[made.get("domain_spec_batchnorm", False)]
    query = made.get("mvc_decoder_style", "inner product").partition(",")[0].removesuffix(" query").replace(" ", "_")
    assert (
        inferred.items()
        >= {
            **{"vocab_size": made["ntoken"], "hidden_size": made["d_model"], "intermediate_size": made["d_hid"]},
            **{
                "num_hidden_layers": made["nlayers"],
                "class_head_layers": made["nlayers_cls"],
                "num_labels": made["n_cls"],
            },
            "value_encoder": made.get("input_emb_style", "continuous"),
            "explicit_zero_prob": made.get("explicit_zero_prob", False),
            "domain_embedding": made.get("use_batch_labels", False),
            "domain_head": made.get("do_dab", False),
            "n_domains": made.get("num_batch_labels", 0),
            **{"input_norm": norm, "gepc_query": query},
        }.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_the_reference_implementation_equals_the_original(fixtures: Path, name: str) -> None:
    made, batch, expected = read(fixtures / name)
    known = convert_scgpt(fixtures / name)[2].inferred
    original = Original(
        width=made["d_model"],
        n_heads=made["nhead"],
        n_layers=made["nlayers"],
        values=known["value_encoder"],
        pre_norm=made.get("pre_norm", False),
        pooling=switches_of(made)["cell_pooling"],
        explicit_zero=known["explicit_zero_prob"],
        query=known["gepc_query"],
        n_domains=known["n_domains"],
        norm=known["input_norm"],
        n_classes=made["n_cls"],
        class_layers=made["nlayers_cls"],
    )
    weights = torch.load(fixtures / name / "best_model.pt", weights_only=True)
    weights = {key.replace("Wqkv.", "in_proj_"): tensor for key, tensor in weights.items()}
    inputs = {"ids": batch["input_ids"], "values": batch["values"], "domains": batch["domain_ids"]}
    real = batch["attention_mask"]
    found = forward(weights, original, inputs | {"real": real})
    atol = 2e-4 if name == "scaling_values" else 2e-5
    for ours, theirs in (("gep", "mlm_output"), ("gepc", "mvc_output"), ("last_hidden_state", "last_hidden_state")):
        if theirs in expected:
            assert_matches(found[ours][real], expected[theirs][real], atol)
    for ours, theirs in (("gep_zero", "mlm_zero_probs"), ("gepc_zero", "mvc_zero_probs")):
        if theirs in expected:
            assert_matches(found[ours].sigmoid()[real], expected[theirs][real])
    for ours, theirs in (("cell_embedding", "cell_emb"), ("class_logits", "cls_output"), ("dar", "dab_output")):
        if theirs in expected:
            assert_matches(found[ours], expected[theirs], atol)


def test_a_multi_omic_model_keeps_its_encoder_and_reports_dropped_heads(fixtures: Path) -> None:
    made, batch, expected = read(fixtures / "multiomic_mod_types")
    model, _, report = convert_scgpt(fixtures / "multiomic_mod_types", **switches_of(made))
    assert_matches(model(**batch).cell_embedding, expected["cell_emb"])
    heads = {key.partition(".")[0] for key in report.left_out}
    assert heads == {"decoder", "mvc_decoder", "batch_encoder", "mod_encoder"}
    assert all("modality" in reason for reason in report.left_out.values())
    assert model.config.loss_weights == {"cls": 1.0}  # no expression head, because its weights would be random


def test_the_script_converts_a_case_with_its_switches(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, batch, expected = read(fixtures / "flash_prenorm")
    options = [str(fixtures / "flash_prenorm"), "--out", str(tmp_path / "out"), "--norm_scheme", "scgpt_pre"]
    monkeypatch.setattr(sys, "argv", ["convert.py", *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "assumed: cell_pooling cls, gepc_detach False, ecs_threshold 0.3, cls_value -2" in printed
    found = AutoModel.from_pretrained(tmp_path / "out")(**batch)
    assert_matches(found.cell_embedding, expected["cell_emb"])
