"""Signals: the first one saves a checkpoint and stops the run, a second one ends the process at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from scgpt_hf.cells import threads
from scgpt_hf.training.fault_tolerance import signals
from scgpt_hf.training.fault_tolerance.checkpoints import checkpoints_in, newest_valid, verify
from scgpt_hf.training.fault_tolerance.signals import StopSignal, TrainingInterrupted
from tests.support.training import EVERY_4, prepare, read_metrics, weights_of


class Send(TrainerCallback):
    """Sends this process a signal at the end of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def uninterrupted(small_census, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    trainer, _, _ = prepare(small_census, folder, *EVERY_4)
    trainer.train()
    return folder, trainer


@pytest.mark.parametrize("flags", [(), ("--save_in_background", "true")], ids=["foreground", "background"])
@pytest.mark.parametrize(
    ("step", "number", "code"),  # the run saves every 4 steps
    [
        (3, signal.SIGTERM, 143),
        (4, signal.SIGINT, 130),
        (5, signal.SIGUSR1, 138),
        ("end of an epoch", signal.SIGTERM, 143),
    ],
)
def test_a_signal_saves_a_checkpoint_from_which_the_run_resumes_exactly(
    small_census, uninterrupted, tmp_path, step, number, code, flags
):
    run, expected = uninterrupted
    step = expected.schedule.epoch_ends[0] if step == "end of an epoch" else step
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, *flags, stop_signal=StopSignal())
    trainer.add_callback(Send(number, step))
    before = signal.getsignal(number)
    with pytest.raises(
        TrainingInterrupted, match=f"by {number.name} after step {step}\\..*checkpoint-{step} was saved"
    ) as caught:
        trainer.train()
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert newest_valid(tmp_path / "run").name == f"checkpoint-{step}"
    resumed, _, checkpoint = prepare(small_census, tmp_path / "run", *EVERY_4, "--resume_from_checkpoint", "latest")
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(expected).items():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name
    assert read_metrics(tmp_path / "run") == read_metrics(run)


def test_the_message_names_the_settings_that_continue_the_run(tmp_path):
    assert "continue with --resume_from_checkpoint latest" in str(TrainingInterrupted(2, 1, tmp_path / "checkpoint-1"))
    (tmp_path / "settings.yaml").touch()
    message = str(TrainingInterrupted(2, 1, tmp_path / "checkpoint-1"))
    assert message.endswith(f"continue with {tmp_path / 'settings.yaml'} --resume_from_checkpoint latest")


def test_a_run_resumes_after_a_signal_before_the_first_step(small_census, tmp_path):
    class SendBeforeFirstStep(TrainerCallback):
        def on_train_begin(self, *_, **__):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, stop_signal=StopSignal())
    trainer.add_callback(SendBeforeFirstStep())
    with pytest.raises(TrainingInterrupted, match="after step 0"):
        trainer.train()
    assert verify(newest_valid(tmp_path / "run")).step == 0
    resumed, _, checkpoint = prepare(
        small_census, tmp_path / "run", *EVERY_4, "--resume_from_checkpoint", "latest", "--max_steps", "2"
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 2


def test_a_signal_stops_a_validation_which_is_done_on_resume(small_census, uninterrupted, tmp_path):
    trainer, data_module, _ = prepare(small_census, tmp_path / "run", *EVERY_4, stop_signal=StopSignal())
    seen = []

    def validation():
        for batch in data_module.validation():
            seen.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    trainer.validation_stream = validation
    end = trainer.schedule.epoch_ends[0]
    with pytest.raises(TrainingInterrupted, match=f"after step {end}"):
        trainer.train()
    assert not [line for line in trainer.state.log_history if "eval_loss" in line]
    resumed, _, checkpoint = prepare(small_census, tmp_path / "run", *EVERY_4, "--resume_from_checkpoint", "latest")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert read_metrics(tmp_path / "run") == read_metrics(uninterrupted[0])


def test_a_signal_stops_a_run_that_waits_for_cells(small_census, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "JOIN_TIMEOUT_S", 0.1)
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, stop_signal=StopSignal())
    open_stream, released = trainer.loader.open_stream, threading.Event()

    def hang_after_3(first):
        for number, batch in enumerate(open_stream(first), start=first):
            if number == 3:
                while trainer.state.global_step < 3:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)
                released.wait()
            yield batch

    trainer.loader.open_stream = hang_after_3
    with pytest.raises(TrainingInterrupted, match="by SIGTERM after step 3"):
        trainer.train()
    released.set()
    assert verify(newest_valid(tmp_path / "run")).step == 3


def test_a_signal_after_the_last_step_reaches_the_previous_handler(small_census, tmp_path):
    trainer, _, _ = prepare(
        small_census, tmp_path / "run", *EVERY_4, "--max_steps", "3", "--eval_strategy", "no", stop_signal=StopSignal()
    )
    trainer.add_callback(Send(signal.SIGINT, 3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-3"]


def test_a_trainer_without_a_stop_signal_leaves_the_handlers_alone(small_census, tmp_path):
    """A library call must not change what Ctrl-C does in the caller's process."""

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)])

    seen = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4)
    trainer.add_callback(Watch())
    trainer.add_callback(Send(signal.SIGINT, 6))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [before] * len(seen)
    assert newest_valid(tmp_path / "run").name == "checkpoint-4"
    assert not [thread.name for thread in threading.enumerate() if thread.name == "scgpt-prefetch"]


def test_a_stop_signal_in_another_thread_installs_no_handler():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import signal, time\n"
        "from signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"
        "        if stop.number: print(int(stop.number), flush=True)\n"
    )
    # The module is imported from its folder, so that the process does not import torch.
    folder = Path(signals.__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # the launcher forwards the same Ctrl-C
        assert process.stdout.readline() == "2\n"
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
