"""The moving average of the weights: its formula, what is validated and saved, and exact resume."""

import shutil

import pytest
import torch

from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.publishing.publish_run import collect_files
from scgpt_hf.training.optimization.averaging import TRAINING_WEIGHTS, WeightAverage
from scgpt_hf.training.run_folder import save_best_model
from scgpt_hf.training.summary import summarize
from tests.support.training import EVERY_4, QUIET, prepare, read_metrics, weights_of

EMA = ("--ema_decay", "0.9")


@pytest.fixture(scope="module")
def trained(small_census, tmp_path_factory):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    trainer, data_module, _ = prepare(small_census, folder, *EMA, *EVERY_4)
    trainer.train()
    return trainer, data_module, folder


def test_the_average_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    weights = torch.tensor([1.0, 3.0, -2.0, 5.0])
    with torch.no_grad():
        model.weight.fill_(weights[0])
    average, expected = WeightAverage(model, decay=0.2), float(weights[0])
    for step, weight in enumerate(weights[1:].tolist(), start=1):
        with torch.no_grad():
            model.weight.fill_(weight)
        average.update(step)
        kept = min(0.2, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight
    assert average.weights["weight"].item() == pytest.approx(expected)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == weights[-1]


def test_training_is_that_of_a_run_without_average(small_census, trained, tmp_path):
    plain, *_ = prepare(small_census, tmp_path / "run", *EVERY_4)
    plain.train()
    logged = [[line["loss"] for line in read_metrics(run) if "gep" in line] for run in (trained[2], tmp_path / "run")]
    assert logged[0] == logged[1]
    average = weights_of(trained[0])
    assert any(not torch.equal(weight, average[name]) for name, weight in weights_of(plain).items())


def test_the_average_is_validated_and_saved(trained, tmp_path):
    trainer, data_module, folder = trained
    last = [line for line in read_metrics(folder) if "eval_loss" in line][-1]
    assert trainer.validate()["loss"] == pytest.approx(last["eval_loss"])
    step = trainer.state.global_step - trainer.state.global_step % 4
    checkpoint = folder / f"checkpoint-{step}"
    saved = dict(ScGPTForPreTraining.from_pretrained(checkpoint).named_parameters())
    trained_on = dict(
        ScGPTForPreTraining.from_pretrained(
            checkpoint / TRAINING_WEIGHTS, config=trainer.model.config
        ).named_parameters()
    )
    assert any(not torch.equal(saved[name], weight) for name, weight in trained_on.items())
    save_best_model(trainer, folder)
    best = ScGPTForPreTraining.from_pretrained(folder / "best_model")
    assert all(torch.equal(weight, trainer.model.get_parameter(name)) for name, weight in best.named_parameters())
    assert summarize(trainer, data_module)["recipe"]["ema_decay"] == 0.9
    published = collect_files(folder, "owner/name", checkpoint.name)
    assert [name for name in published if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "exponential moving average, decay 0.9" in str(published["README.md"])


def test_the_best_checkpoint_is_an_average(small_census, tmp_path):
    flags = ("--save_strategy", "epoch", "--eval_strategy", "epoch", "--load_best_model_at_end", "true")
    trainer, *_ = prepare(small_census, tmp_path / "run", *EMA, *flags)
    trainer.train()
    assert trainer.validate()["loss"] == pytest.approx(trainer.state.best_metric)


@pytest.mark.parametrize("step", [4, 8])
def test_resumed_equals_uninterrupted(small_census, trained, tmp_path, step):
    uninterrupted, _, run = trained
    folder = shutil.copytree(run, tmp_path / "run")
    flags = (*EMA, *QUIET, "--resume_from_checkpoint", str(folder / f"checkpoint-{step}"))
    resumed, _, checkpoint = prepare(small_census, folder, *flags)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, uninterrupted.model.get_parameter(name)), name


def test_a_run_cannot_resume_without_its_average(small_census, trained, tmp_path):
    folder = shutil.copytree(trained[2], tmp_path / "run")
    with pytest.raises(ValueError, match=r"'ema_decay': 0\.9"):
        prepare(small_census, folder, *QUIET, "--resume_from_checkpoint", str(folder / "checkpoint-4"))


@pytest.mark.parametrize("decay", ["1", "-0.1", "nan"])
def test_a_decay_out_of_range_raises(small_census, tmp_path, decay):
    with pytest.raises(ValueError, match="ema_decay finite, >= 0 and < 1"):
        prepare(small_census, tmp_path / "run", "--ema_decay", decay)
