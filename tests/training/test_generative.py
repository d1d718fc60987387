"""Generative pretraining: what a run reads, its second pass, its metrics, and exact resume."""

import json

import pytest
import torch

from scgpt_hf.pretraining import pretrain
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support.training import QUIET, TINY, assert_resumes_exactly, prepare, read_metrics, weights_of

GENERATIVE = (
    *("--objective", "generative", "--loss_weights", '{"gep": 1.0, "gepc": 1.0, "gen": 1.0}'),
    *("--gen_after_steps", "6", "--cls_shortcut", "true"),
)


def test_a_run_asks_for_the_genes_that_masked_training_masks(small_census, tmp_path):
    _, data, _ = prepare(small_census, tmp_path / "generative", *GENERATIVE)
    _, masked, _ = prepare(small_census, tmp_path / "masked", "--cls_shortcut", "true")
    shares = set()
    for batch, other in zip(data.train(0), masked.train(0), strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
        assert torch.equal(batch["queries"], other["labels"] != IGNORE)
        assert torch.equal(batch["key_positions"], (~batch["queries"][0]).nonzero()[:, 0])
        n_genes, n_given = batch["cu_seq_lens_q"].diff() - 1, batch["cu_seq_lens_k"].diff() - 1
        assert int(n_given.max()) + 1 == batch["max_length_k"]
        possible = {int(ratio * n): ratio for n in n_genes.tolist() for ratio in (0.25, 0.5, 0.75)}
        shares |= {possible[n] for n in (n_genes - n_given).tolist()}
    assert shares == {0.25, 0.5, 0.75}
    assert all("queries" not in batch for batch in data.unmasked())


def test_a_run_learns_resumes_exactly_and_starts_its_second_pass_late(small_census, tmp_path):
    resumed = assert_resumes_exactly(small_census, tmp_path, *GENERATIVE)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run") if "loss" in line}
    assert "gen" not in lines[6]
    assert lines[6]["loss"] == pytest.approx(lines[6]["gep"] + lines[6]["gepc"], rel=1e-5)
    assert lines[7]["loss"] == pytest.approx(lines[7]["gep"] + lines[7]["gepc"] + lines[7]["gen"], rel=1e-5)
    assert lines[max(lines)]["gepc"] < lines[1]["gepc"]
    metrics = resumed.validate()
    assert metrics["gen_mse"] > 0
    assert metrics["loss"] == pytest.approx(metrics["gep_mse"] + metrics["gepc_mse"] + metrics["gen_mse"])
    other = ("--objective", "masked", "--loss_weights", '{"gep": 1.0, "gepc": 1.0}', "--cls_shortcut", "true")
    with pytest.raises(ValueError, match=r"started with \{'objective': 'generative'"):
        prepare(small_census, tmp_path / "run", *other, "--resume_from_checkpoint", "latest")


def test_one_batch_of_32_equals_four_of_8_accumulated(small_census, tmp_path):
    weights = []
    for name, sizes in {"one": ("32", "1"), "four": ("8", "4")}.items():
        flags = ("--per_device_train_batch_size", sizes[0], "--gradient_accumulation_steps", sizes[1], "--dropout", "0")
        trainer, *_ = prepare(small_census, tmp_path / name, *GENERATIVE, *flags, *QUIET)
        trainer.train()
        weights.append(weights_of(trainer))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=2e-3, atol=2e-4, msg=name)


def test_a_complete_run_in_bfloat16_names_its_objective(small_census, tmp_path):
    flags = [
        *TINY,
        *GENERATIVE,
        "--data",
        str(small_census),
        "--output_dir",
        str(tmp_path / "run"),
        "--bf16",
        "true",
        "--fit_baselines",
        "none",
    ]
    pretrain(parse_settings([*flags, "--num_train_epochs", "1"]), report=lambda _: None)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "they are queries by name only" in card
    assert "GEN" in card
    config = json.loads((tmp_path / "run" / "best_model" / "config.json").read_text())
    assert config["objective"] == "generative"


def test_a_second_pass_of_masked_training_is_refused_before_data_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"'gen' predicts the queries of objective='generative'"):
        prepare(tmp_path / "no such data", tmp_path / "run", "--loss_weights", '{"gep": 1.0, "gen": 1.0}')
