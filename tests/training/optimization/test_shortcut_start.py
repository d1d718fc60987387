"""`shortcut_steps`: the shortcut and the count decoder are trained alone before a run."""

import pytest
import torch

from scgpt_hf.pretraining import describe_pretraining, prepare_run
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support.training import QUIET, TINY, prepare, read_metrics, weights_of

COUNTS = ("--loss_weights", '{"gep": 0.01, "counts": 1.0}', "--cls_shortcut", "true")


@pytest.fixture(scope="module")
def started(small_census, tmp_path_factory):
    """Trainers before their first step: without and with a trained shortcut."""
    folder = tmp_path_factory.mktemp("shortcut")
    return [
        prepare(small_census, folder / n_steps, *COUNTS, *QUIET, "--shortcut_steps", n_steps)[0]
        for n_steps in ("0", "20")
    ]


def test_the_count_loss_falls_before_the_first_step_of_the_run(started):
    new, trained = started
    assert trained.validate()["counts"] < new.validate()["counts"]


def test_only_the_shortcut_and_the_decoder_change(started):
    new, trained = (weights_of(trainer) for trainer in started)
    changed = {name for name, weight in new.items() if not torch.equal(weight, trained[name])}
    assert {name.partition("count_head")[1] or name.partition("shortcut")[1] for name in changed} == {
        "count_head",
        "shortcut",
    }
    assert "scgpt.shortcut.state_weight" not in changed


def test_it_is_deterministic_and_independent_of_the_batch_size_of_the_run(small_census, started, tmp_path):
    torch.rand(3)  # global randomness has no effect
    flags = ("--shortcut_steps", "20", "--per_device_train_batch_size", "8")
    again, *_ = prepare(small_census, tmp_path / "run", *COUNTS, *QUIET, *flags)
    for name, weight in weights_of(started[1]).items():
        assert torch.equal(weight, weights_of(again)[name]), name


def test_a_resumed_run_equals_an_uninterrupted_one(small_census, tmp_path):
    saves = ("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "20")
    flags = (*COUNTS, *QUIET, "--shortcut_steps", "5", *saves)
    whole, *_ = prepare(small_census, tmp_path / "run", *flags)
    whole.train()
    expected = read_metrics(tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed, _, start = prepare(small_census, tmp_path / "run", *flags, "--resume_from_checkpoint", checkpoint)
    resumed.train(resume_from_checkpoint=start)
    assert read_metrics(tmp_path / "run") == expected
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_the_loss_beside_the_bar_adds_no_lines_to_a_log_file(small_census, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scgpt_hf.progress_bar._DELAY_S", 0.0)
    monkeypatch.setattr("scgpt_hf.progress_bar._SECONDS_BETWEEN_LINES", 1e9)
    prepare(small_census, tmp_path / "run", *COUNTS, "--shortcut_steps", "200", "--disable_tqdm", "false")
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines() if "shortcut" in line] == [
        "shortcut: 0 %",
        "shortcut: 100 %",
    ]


def test_the_steps_before_the_run_are_announced(small_census, tmp_path, caplog):
    flags = (*COUNTS, *QUIET, "--max_steps", "7", "--shortcut_steps")
    with caplog.at_level("INFO", "scgpt_hf"):
        prepare(small_census, tmp_path / "none", *flags, "0")
        assert "shortcut" not in caplog.text
        prepare(small_census, tmp_path / "some", *flags, "5")
    assert "before the 7 steps of the run, 5 steps train the shortcut" in caplog.text


def test_the_dry_run_says_that_its_time_is_without_the_shortcut(small_census, tmp_path):
    flags = [*TINY, *COUNTS, "--data", str(small_census), "--output_dir", str(tmp_path / "run"), "--dry_run", "true"]
    assert "before them 5 of the shortcut alone" in describe_pretraining(
        parse_settings([*flags, "--shortcut_steps", "5"])
    )
    assert "shortcut" not in describe_pretraining(parse_settings(flags))


@pytest.mark.parametrize(
    "flags", [("--cls_shortcut", "true"), ("--loss_weights", '{"gep": 0.01, "counts": 1.0}', "--cls_shortcut", "false")]
)
def test_a_model_without_shortcut_or_decoder_is_refused_before_data_are_read(flags, tmp_path):
    absent = ("--data", str(tmp_path / "absent"), "--output_dir", str(tmp_path / "run"))
    settings = parse_settings([*TINY, *flags, *absent, "--shortcut_steps", "5"])
    with pytest.raises(ValueError, match="shortcut_steps"):
        prepare_run(settings)
