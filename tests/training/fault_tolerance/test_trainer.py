"""What happens to long runs, done to short ones: bad numbers, lost data, full disks, other batches, early kills."""

import logging
import resource
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from scgpt_hf.cells.schedule.run import plan_run
from scgpt_hf.training.fault_tolerance.checkpoints import checkpoints_in, newest_valid, verify
from scgpt_hf.training.fault_tolerance.nonfinite import NonFiniteGuard, all_finite, propagate_nonfinite
from scgpt_hf.training.run_folder import finished_summary, save_best_model
from scgpt_hf.training.summary import summarize
from tests.support.training import EVERY_4, QUIET, prepare, read_metrics, weights_of


def poison(trainer, steps, key="labels"):
    """Put a NaN into a batch of each of the steps, counted from 0."""
    opened, micro = trainer.loader.open_stream, trainer.args.gradient_accumulation_steps

    def stream(first):
        for number, batch in enumerate(opened(first), start=first):
            if number % micro == micro - 1 and number // micro in steps:
                where = (batch["labels"] >= 0).ravel().nonzero()[0] if key == "labels" else 1
                batch[key].view(-1)[where] = torch.nan
            yield batch

    trainer.loader.open_stream = stream


class Watch(TrainerCallback):
    """Keeps weights, moments and buffers after each step."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, {}

    def on_step_end(self, args, state, control, **_):
        moments = [
            v.clone() for m in self.trainer.optimizer.optimizer.state.values() for v in m.values() if v is not None
        ]
        buffers = [buffer.clone() for buffer in self.trainer.model.buffers()]
        self.seen[state.global_step] = [*weights_of(self.trainer).values(), *moments, *buffers]


@pytest.mark.parametrize(
    ("key", "flags"),
    [
        ("labels", ()),
        ("values", ()),
        ("labels", ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "16")),
        ("labels", ("--optim", "adamw_torch")),
        ("values", ("--input_norm", "domain", "--batch_key", "dataset_id")),
    ],
    ids=["labels", "values", "accumulated", "unfused", "with batch norm"],
)
def test_a_bad_step_changes_nothing_and_names_its_cells(small_census, tmp_path, caplog, key, flags):
    trainer, _, _ = prepare(small_census, tmp_path / "run", *QUIET, "--max_steps", "6", *flags)
    poison(trainer, {2, 3, 5}, key)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    for before, after in pairwise(range(1, 7)):
        same = [torch.equal(a, b) for a, b in zip(watch.seen[before], watch.seen[after], strict=True)]
        assert all(same) if after in {3, 4, 6} else not any(same[:3])
    assert all_finite(watch.seen[6])
    for step in (2, 3, 5):
        assert f"step {step + 1} is skipped" in caplog.text
        assert str(trainer.schedule.cells(step).tolist()) in caplog.text
    assert caplog.text.count("is skipped") == 3
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_bad_steps_in_a_row_end_the_run_and_reach_no_checkpoint(small_census, tmp_path):
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, "--max_bad_steps", "3")
    poison(trainer, {1, 2, 5, 6, 7, 8})
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 8.*lower --learning_rate"):
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-4"]
    assert all_finite(weights_of(trainer).values())


def test_weights_that_are_not_finite_are_not_saved(small_census, tmp_path):
    class Harm(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 8:
                next(model.parameters()).data.view(-1)[0] = torch.inf

    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4)
    trainer.add_callback(Harm())
    with pytest.raises(FloatingPointError, match="not finite after step 8: nothing was saved"):
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-4"]


def test_a_finite_loss_keeps_its_gradient_to_the_bit_and_another_spoils_all():
    for factor, expected in ((3.0, torch.tensor([3.0, 6.0])), (torch.inf, None)):
        weight = torch.tensor([1.0, 2.0], requires_grad=True)
        loss = (weight * weight).sum() * 1.5
        propagate_nonfinite(loss * factor / 1.5 / 2 + loss / 4 * 0).backward()
        assert torch.equal(weight.grad, expected) if expected is not None else weight.grad.isnan().all()


def test_on_a_device_bad_steps_are_seen_when_they_are_reviewed(caplog):
    """Flags of a GPU stay there; here those of the meta device stand in until the review."""
    guard = NonFiniteGuard(2, lambda step: np.array([step]), tells=True)
    guard._unseen = [(0, torch.tensor(True)), (1, torch.tensor(False)), (2, torch.tensor(True))]
    guard.review()
    assert "[0]" in caplog.text
    assert "[2]" in caplog.text
    guard._unseen = [(3, torch.tensor(True))]
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 4"):
        guard.review()


def test_lost_data_end_in_an_error_and_a_checkpoint_that_resumes_exactly(small_census, tmp_path):
    whole, _, _ = prepare(small_census, tmp_path / "whole", *EVERY_4, "--dropout", "0.1")
    whole.train()
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, "--dropout", "0.1")
    opened = trainer.loader.open_stream

    def stream(first):
        for number, batch in enumerate(opened(first), start=first):
            if number == 6:
                raise OSError("the array is gone")
            yield batch

    trainer.loader.open_stream = stream
    with pytest.raises(OSError, match=r"could not be read after step 6: the array is gone; .*checkpoint-6 holds"):
        trainer.train()
    resumed, _, checkpoint = prepare(
        small_census, tmp_path / "run", *EVERY_4, "--dropout", "0.1", "--resume_from_checkpoint", "latest"
    )
    assert checkpoint.endswith("checkpoint-6")
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


@pytest.fixture(scope="module")
def finished(small_census, tmp_path_factory):
    """A run of two epochs of 6 steps, saved every 4 and validated after each epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer, data_module, _ = prepare(
        small_census, folder, *EVERY_4, "--save_steps", "2", "--per_device_train_batch_size", "30"
    )
    trainer.train()
    save_best_model(trainer, folder)
    summarize(trainer, data_module)
    return folder, trainer


def test_a_validation_that_a_kill_prevented_is_made_up_for(small_census, finished, tmp_path):
    """The checkpoint of an epoch's last step is written before the epoch is validated."""
    run, trainer = finished
    end = trainer.schedule.epoch_ends[0]
    assert end % 2 == 0
    folder = shutil.copytree(run, tmp_path / "run")
    flags = (*EVERY_4, "--save_steps", "2", "--per_device_train_batch_size", "30")
    resumed, _, checkpoint = prepare(
        small_census, folder, *flags, "--resume_from_checkpoint", str(folder / f"checkpoint-{end}")
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    assert read_metrics(folder) == read_metrics(run)
    assert resumed.state.best_metric == trainer.state.best_metric
    assert resumed.state.best_model_checkpoint == str(folder / Path(trainer.state.best_model_checkpoint).name)


def test_a_finished_run_is_known_as_such(finished, tmp_path):
    run, trainer = finished
    assert not finished_summary(run, trainer.schedule)  # its card is missing, as after a disk that was full at the end
    (run / "README.md").touch()
    assert finished_summary(run, trainer.schedule)
    cells = trainer.schedule.segments[0].plan.cell_ids
    longer = plan_run(cells, batch_size=30, n_epochs=3, seed=42)
    assert not finished_summary(run, longer)
    assert not finished_summary(tmp_path, trainer.schedule)
    (tmp_path / "summary.json").write_text("[3]")
    assert not finished_summary(tmp_path, trainer.schedule)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--hidden_size", "32"], "does not fit the model"), (["--loss_weights", '{"gep": 1}'], "does not fit the model")],
)
def test_another_model_cannot_be_resumed(small_census, finished, tmp_path, flags, message):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    trainer, _, checkpoint = prepare(
        small_census, folder, "--per_device_train_batch_size", "30", "--resume_from_checkpoint", "latest",
        "--num_train_epochs", "3", *flags,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_with_another_batch_the_rest_of_the_epoch_is_visited_once(small_census, finished, tmp_path, caplog):
    run, whole = finished
    folder = shutil.copytree(run, tmp_path / "run")
    flags = (*EVERY_4, "--per_device_train_batch_size", "22", "--num_train_epochs", "3")
    with caplog.at_level(logging.INFO):
        trainer, _, checkpoint = prepare(
            small_census, folder, *flags, "--resume_from_checkpoint", str(folder / "checkpoint-2")
        )
    assert "steps of 22 cells instead of 30" in caplog.text
    taken = []
    take = trainer.get_batch_samples

    def count(*arguments):
        batches, n_masked = take(*arguments)
        taken.extend(len(batch["cu_seq_lens_q"]) - 1 for batch in batches)
        return batches, n_masked

    trainer.get_batch_samples = count
    trainer.train(resume_from_checkpoint=checkpoint)
    schedule = trainer.schedule
    assert taken == [22] * (schedule.n_steps - 2)
    assert trainer.state.global_step == schedule.n_steps
    assert trainer.state.epoch == 3
    cells = np.concatenate([schedule.cells(step) for step in range(schedule.epoch_ends[0])])
    assert len(np.unique(cells)) == len(cells) > len(whole.schedule.segments[0].plan.cell_ids) - 22
    np.testing.assert_array_equal(schedule.cells(1), whole.schedule.cells(1))
    assert verify(newest_valid(folder)).history == [(30, 2), (22, schedule.n_steps - 2)]
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert max(abs(a - b) for a, b in pairwise(rates[4:])) < 1.5 * max(rates) / (schedule.n_steps - 3)
    again, _, checkpoint = prepare(
        small_census, folder, *EVERY_4, "--num_train_epochs", "4", "--resume_from_checkpoint", "latest"
    )
    again.train(resume_from_checkpoint=checkpoint)
    assert again.state.epoch == 4
    sizes = [(30, 2), (22, schedule.n_steps - 2), (32, again.schedule.n_steps - schedule.n_steps)]
    assert verify(newest_valid(folder)).history == sizes


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(small_census, tmp_path):
    """The limit of file sizes fails the write itself, as a full disk does."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4)
    trainer.add_callback(Fill())
    try:
        with pytest.raises(OSError, match=r"step 8 could not be written: .*checkpoint-4 is untouched"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert newest_valid(tmp_path / "run").name == "checkpoint-4"
    assert not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.parametrize("flags", [("--save_total_limit", "1"), ("--save_only_model", "true")])
def test_checkpoints_that_nobody_could_go_on_from_are_refused(small_census, tmp_path, flags):
    with pytest.raises(ValueError, match="save_total_limit of 2 or more and no save_only_model"):
        prepare(small_census, tmp_path / "run", *flags)
