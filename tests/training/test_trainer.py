"""The pretraining trainer: losses, logs and metrics, learning rates, accumulation, and resuming."""

import json
import re
import shutil

import pytest
import torch

from scgpt_hf.pretraining import describe_pretraining
from scgpt_hf.training.run_folder import save_best_model
from scgpt_hf.training.settings_parsing import parse_settings
from scgpt_hf.training.summary import format_summary, summarize
from tests.support.training import EVERY_4, QUIET, TINY, prepare, weights_of


@pytest.fixture(scope="module")
def trained(small_census, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "uninterrupted"
    trainer, data_module, checkpoint = prepare(
        small_census, folder, *EVERY_4, "--eval_strategy", "steps", "--eval_steps", "4", "--logging_steps", "5"
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, data_module, folder


def test_the_last_steps_of_a_run_are_logged(small_census, tmp_path):
    flags = ("--max_steps", "3", "--logging_steps", "100", "--eval_strategy", "no", "--load_best_model_at_end", "false")
    trainer, _, _ = prepare(small_census, tmp_path / "run", *flags)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "gep" in line]
    assert line["step"] == 3


def test_the_metric_of_the_best_model_must_be_one_that_validation_measures(small_census, tmp_path):
    with pytest.raises(ValueError, match=r"'mse'.*gep_mse"):
        prepare(small_census, tmp_path / "run", "--metric_for_best_model", "eval_mse")
    prepare(small_census, tmp_path / "run", "--metric_for_best_model", "variance_explained")


def test_the_log_has_losses_speed_and_validation_metrics(trained):
    _, _, folder = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "gep" in line]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert all(line["loss"] == pytest.approx(line["gep"] + line["gepc"], rel=1e-5) for line in losses)
    assert {"cells_per_second", "tokens_per_second", "waiting_share", "grad_norm", "learning_rate"} <= losses[0].keys()
    validation = next(line for line in lines if "eval_loss" in line)
    named = {
        "gep_mse",
        "gepc_mse",
        "constant_mse",
        "gene_mean_mse",
        "tie_floor_mse",
        "variance_explained",
        "cells",
        "seconds",
    }
    assert {f"eval_{name}" for name in named} <= validation.keys()
    assert validation["eval_tie_floor_mse"] < validation["eval_gene_mean_mse"] < 1.2 * validation["eval_constant_mse"]
    explained = 1 - validation["eval_gep_mse"] / validation["eval_constant_mse"]
    assert validation["eval_variance_explained"] == pytest.approx(explained)


def test_validation_is_the_same_every_time(trained):
    trainer, data_module, _ = trained
    assert trainer.validate() == trainer.validate()
    assert trainer.validate()["cells"] == len(data_module.selection.parts["validation"])


@pytest.mark.parametrize("step", [4, 8])
def test_resumed_equals_uninterrupted(small_census, trained, tmp_path, step):
    uninterrupted, _, run = trained
    folder = shutil.copytree(run, tmp_path / "run")
    checkpoint = folder / f"checkpoint-{step}"
    flags = ("--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "false")
    resumed, _, found = prepare(small_census, folder, *flags, "--resume_from_checkpoint", str(checkpoint))
    resumed.train(resume_from_checkpoint=found)
    assert resumed.state.global_step == uninterrupted.state.global_step
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, uninterrupted.model.get_parameter(name)), name
    expected = {line["step"]: line for line in uninterrupted.state.log_history if "gep" in line}
    for line in resumed.state.log_history:
        if "gep" in line:
            assert line["gep"] == expected[line["step"]]["gep"]
            assert line["loss"] == pytest.approx(line["gep"] + line["gepc"], rel=1e-4)


def test_one_batch_of_32_equals_four_of_8_accumulated(small_census, tmp_path):
    flags = (*QUIET, "--dropout", "0", "--optim", "sgd", "--learning_rate", "1e-4")
    weights, losses = [], []
    for name, batch, accumulation in (("one batch", "32", "1"), ("accumulated", "8", "4")):
        trainer, _, _ = prepare(
            small_census,
            tmp_path / name,
            *flags,
            *("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation),
        )
        trainer.train()
        weights.append(weights_of(trainer))
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-5, rtol=1e-4)


def test_the_learning_rate_of_scgpts_recipe_steps_down_after_each_epoch(small_census, tmp_path):
    trainer, data_module, _ = prepare(
        small_census, tmp_path / "run", "--lr_decay_per_epoch", "0.5", "--warmup_steps", "0", "--learning_rate", "1e-3"
    )
    n_steps = data_module.first_plan.n_steps
    trainer.create_optimizer_and_scheduler(2 * n_steps)
    rates = []
    for _ in range(2 * n_steps):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([1e-3] * n_steps + [5e-4] * n_steps)


def test_a_finished_run_has_a_best_model_and_a_summary(trained):
    trainer, data_module, folder = trained
    save_best_model(trainer, folder)
    saved = {path.name for path in (folder / "best_model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} <= saved
    assert not [name for name in saved if name.endswith((".bin", ".pt", ".pth"))]
    summary = summarize(trainer, data_module)
    assert json.loads((folder / "summary.json").read_text())["train_cells"] == summary["train_cells"]
    assert summary["recipe"]["optimizer"].startswith("adamw")
    assert summary["recipe"]["seed"] == trainer.args.seed
    words = format_summary(summary, folder)
    assert "each gene's mean" in words
    assert f"{summary['best']['eval_gep_mse']:.2f}" in words


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "7"], "'seed': 42"),
        (["--obs_filter", "disease == 'normal'"], "obs_filter"),
        (["--mask_ratios", "0.5"], "mask_ratios"),
    ],
)
def test_a_run_cannot_resume_with_other_cells_order_or_masks(small_census, trained, flags, message):
    _, _, folder = trained
    with pytest.raises(ValueError, match=message):
        prepare(small_census, folder, "--resume_from_checkpoint", "latest", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "15"], "hidden_size"),
        (["--domain_head", "true"], "--batch_key"),
        (["--loss_weights", '{"cls": 1}'], "supervise_by"),
        (["--per_device_train_batch_size", "1000"], "1,000 of one step"),
        (["--gene_selection", "hvg", "--n_hvg", "5000"], "5,?000"),
    ],
)
def test_impossible_settings_raise_before_anything_is_written(small_census, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        prepare(small_census, tmp_path / "run", *flags)
    assert not any(tmp_path.rglob("*.json"))


def test_a_diverged_run_raises(small_census, tmp_path):
    trainer, _, _ = prepare(small_census, tmp_path / "run", "--learning_rate", "1e30", "--max_grad_norm", "0")
    with pytest.raises(FloatingPointError, match="diverged"):
        trainer.train()


@pytest.mark.parametrize(
    "flags", [["--cell_pooling", "average"], ["--input_norm", "domain", "--batch_key", "dataset_id"]]
)
def test_models_that_count_padding_train_on_padded_cells(small_census, tmp_path, flags):
    trainer, _, _ = prepare(small_census, tmp_path / "run", "--logging_steps", "2", *flags)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "gep" in line]
    assert losses[-1] < losses[0]


def test_a_second_run_in_the_same_folder_raises(small_census, trained):
    _, _, folder = trained
    with pytest.raises(FileExistsError, match=folder.name):
        prepare(small_census, folder)


def test_a_dry_run_reports_sizes_and_time_and_writes_nothing(small_census, tmp_path):
    settings = parse_settings(
        [
            *TINY,
            "--data",
            str(small_census),
            "--output_dir",
            str(tmp_path / "run"),
            "--dry_run",
            "true",
            "--cache_dir",
            str(tmp_path / "cache"),
        ],
        "test",
    )
    words = describe_pretraining(settings)
    for name in ("cells", "genes", "tokens per cell", "steps", "parameters", "compute", "time", "memory"):
        assert f"{name}  " in words
    assert 0 < float(re.search(r"\(([\d,]+) ms per step", words)[1].replace(",", "")) < 60_000
    assert not list(tmp_path.iterdir())


def test_domain_heads_train_and_unknown_objectives_raise(small_census, tmp_path):
    weights = json.dumps({"gep": 1, "gepc": 1, "dar": 1, "ecs": 10})
    flags = (
        *("--batch_key", "dataset_id", "--domain_embedding", "true", "--domain_head", "true"),
        *("--loss_weights", weights),
    )
    trainer, _, _ = prepare(small_census, tmp_path / "run", *flags, "--max_steps", "4", "--logging_steps", "2")
    trainer.train()
    line = next(line for line in trainer.state.log_history if "dar" in line)
    assert {"gep", "gepc", "dar", "ecs"} <= line.keys()
    with pytest.raises(ValueError, match="no_such_loss"):
        prepare(small_census, tmp_path / "other", "--loss_weights", '{"no_such_loss": 1}')
