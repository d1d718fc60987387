"""Fault tolerance of a run: values that are not finite, lost data, full disks, other batch sizes, early kills."""

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


def insert_nan(trainer, steps, key="labels"):
    """Put a NaN into one batch of each of the steps, counted from 0."""
    open_stream, micro = trainer.loader.open_stream, trainer.args.gradient_accumulation_steps

    def stream(first):
        for number, batch in enumerate(open_stream(first), start=first):
            if number % micro == micro - 1 and number // micro in steps:
                where = (batch["labels"] >= 0).ravel().nonzero()[0] if key == "labels" else 1
                batch[key].view(-1)[where] = torch.nan
            yield batch

    trainer.loader.open_stream = stream


class RecordState(TrainerCallback):
    """Records weights, optimizer moments and buffers after each step."""

    def __init__(self, trainer):
        self.trainer, self.states = trainer, {}

    def on_step_end(self, args, state, control, **_):
        moments = [
            v.clone() for m in self.trainer.optimizer.optimizer.state.values() for v in m.values() if v is not None
        ]
        buffers = [buffer.clone() for buffer in self.trainer.model.buffers()]
        self.states[state.global_step] = [*weights_of(self.trainer).values(), *moments, *buffers]


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
def test_a_step_that_is_not_finite_changes_nothing_and_logs_its_cells(small_census, tmp_path, caplog, key, flags):
    trainer, _, _ = prepare(small_census, tmp_path / "run", *QUIET, "--max_steps", "6", *flags)
    insert_nan(trainer, {2, 3, 5}, key)
    recorded = RecordState(trainer)
    trainer.add_callback(recorded)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    for before, after in pairwise(range(1, 7)):
        same = [torch.equal(a, b) for a, b in zip(recorded.states[before], recorded.states[after], strict=True)]
        assert all(same) if after in {3, 4, 6} else not any(same[:3])
    assert all_finite(recorded.states[6])
    for step in (2, 3, 5):
        assert f"step {step + 1} was skipped" in caplog.text
        assert str(trainer.schedule.cells(step).tolist()) in caplog.text
    assert caplog.text.count("was skipped") == 3
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_consecutive_skipped_steps_stop_the_run_and_reach_no_checkpoint(small_census, tmp_path):
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, "--max_bad_steps", "3")
    insert_nan(trainer, {1, 2, 5, 6, 7, 8})
    with pytest.raises(FloatingPointError, match="3 consecutive steps, up to step 8"):
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-4"]
    assert all_finite(weights_of(trainer).values())


@pytest.mark.parametrize("flags", [(), ("--save_in_background", "true")], ids=["foreground", "background"])
def test_weights_that_are_not_finite_are_not_saved(small_census, tmp_path, flags):
    class Corrupt(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 8:
                next(model.parameters()).data.view(-1)[0] = torch.inf

    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, *flags)
    trainer.add_callback(Corrupt())
    with pytest.raises(FloatingPointError, match="step 8"):
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-4"]


def test_a_finite_loss_keeps_its_gradient_and_an_infinite_one_makes_all_gradients_nan():
    for factor, expected in ((3.0, torch.tensor([3.0, 6.0])), (torch.inf, None)):
        weight = torch.tensor([1.0, 2.0], requires_grad=True)
        loss = (weight * weight).sum() * 1.5
        propagate_nonfinite(loss * factor / 1.5 / 2 + loss / 4 * 0).backward()
        assert torch.equal(weight.grad, expected) if expected is not None else weight.grad.isnan().all()


def test_skipped_steps_are_counted_when_they_are_checked(caplog):
    """On a GPU several steps are checked at once, when a line is logged."""
    guard = NonFiniteGuard(2, lambda step: np.array([step]), log_skipped=True)
    guard._unchecked = [(0, torch.tensor(True)), (1, torch.tensor(False)), (2, torch.tensor(True))]
    guard.check_recent_steps()
    assert "[0]" in caplog.text
    assert "[2]" in caplog.text
    guard._unchecked = [(3, torch.tensor(True))]
    with pytest.raises(FloatingPointError, match="2 consecutive steps, up to step 4"):
        guard.check_recent_steps()


def test_a_read_error_saves_a_checkpoint_from_which_the_run_resumes_exactly(small_census, tmp_path):
    uninterrupted, _, _ = prepare(small_census, tmp_path / "uninterrupted", *EVERY_4, "--dropout", "0.1")
    uninterrupted.train()
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, "--dropout", "0.1")
    open_stream = trainer.loader.open_stream

    def stream(first):
        for number, batch in enumerate(open_stream(first), start=first):
            if number == 6:
                raise OSError("the array is gone")
            yield batch

    trainer.loader.open_stream = stream
    with pytest.raises(OSError, match=r"step 6: the array is gone.*checkpoint-6"):
        trainer.train()
    resumed, _, checkpoint = prepare(
        small_census, tmp_path / "run", *EVERY_4, "--dropout", "0.1", "--resume_from_checkpoint", "latest"
    )
    assert checkpoint.endswith("checkpoint-6")
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(uninterrupted).items():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "uninterrupted")


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


def test_a_validation_that_a_kill_prevented_is_done_on_resume(small_census, finished, tmp_path):
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


def test_a_finished_run_is_recognized(finished, tmp_path):
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
    "flags",
    [["--hidden_size", "32"], ["--loss_weights", '{"gep": 1}']],
)
def test_a_checkpoint_of_another_model_raises(small_census, finished, tmp_path, flags):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    trainer, _, checkpoint = prepare(
        small_census, folder, "--per_device_train_batch_size", "30", "--resume_from_checkpoint", "latest",
        "--num_train_epochs", "3", *flags,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not fit the model"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_with_another_batch_size_each_cell_of_the_epoch_is_still_visited_once(small_census, finished, tmp_path, caplog):
    run, first = finished
    folder = shutil.copytree(run, tmp_path / "run")
    flags = (*EVERY_4, "--per_device_train_batch_size", "22", "--num_train_epochs", "3")
    with caplog.at_level(logging.INFO):
        trainer, _, checkpoint = prepare(
            small_census, folder, *flags, "--resume_from_checkpoint", str(folder / "checkpoint-2")
        )
    assert "steps of 22 cells instead of 30" in caplog.text
    n_cells = []
    read_step = trainer.read_step

    def count(*arguments):
        batches = read_step(*arguments)
        n_cells.extend(len(batch["cu_seq_lens_q"]) - 1 for batch in batches)
        return batches

    trainer.read_step = count
    trainer.train(resume_from_checkpoint=checkpoint)
    schedule = trainer.schedule
    assert n_cells == [22] * (schedule.n_steps - 2)
    assert trainer.state.global_step == schedule.n_steps
    assert trainer.state.epoch == 3
    cells = np.concatenate([schedule.cells(step) for step in range(schedule.epoch_ends[0])])
    assert len(np.unique(cells)) == len(cells) > len(first.schedule.segments[0].plan.cell_ids) - 22
    np.testing.assert_array_equal(schedule.cells(1), first.schedule.cells(1))
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


@pytest.mark.parametrize("flags", [(), ("--save_in_background", "true")], ids=["foreground", "background"])
def test_a_full_disk_leaves_the_previous_checkpoint_valid(small_census, tmp_path, flags):
    """A limit on file sizes makes the write itself fail, as a full disk does."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, *flags)
    trainer.add_callback(FillDisk())
    try:
        with pytest.raises(OSError, match=r"step 8: .*checkpoint-4 is unchanged"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert newest_valid(tmp_path / "run").name == "checkpoint-4"
    assert not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.parametrize("flags", [("--save_total_limit", "1"), ("--save_only_model", "true")])
def test_settings_without_a_checkpoint_to_resume_from_raise(small_census, tmp_path, flags):
    with pytest.raises(ValueError, match="expected a limit of 2 or more and no save_only_model"):
        prepare(small_census, tmp_path / "run", *flags)
