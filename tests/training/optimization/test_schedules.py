"""The schedule "warmup_stable_decay", whose decay may be a share of the run."""

import pytest

from tests.support.training import prepare


def rates(small_census, folder, *flags):
    """Return the learning rate of each of 10 steps, and the trainer."""
    trainer, *_ = prepare(
        small_census,
        folder,
        *("--lr_scheduler_type", "warmup_stable_decay", "--learning_rate", "1e-3", "--warmup_steps", "0.2"),
        *flags,
    )
    trainer.create_optimizer_and_scheduler(10)
    found = []
    for _ in range(10):
        found.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found, trainer


def test_the_decay_takes_a_fifth_of_the_run_by_default(small_census, tmp_path):
    found, trainer = rates(small_census, tmp_path / "run")
    assert found == pytest.approx([0, 5e-4, *[1e-3] * 7, 5e-4])
    assert trainer.args.lr_scheduler_kwargs is None  # the settings stay as they were given


@pytest.mark.parametrize("n_decay", ["0.4", "4"])
def test_the_decay_may_be_a_share_or_a_number_of_steps(small_census, tmp_path, n_decay):
    arguments = f'{{"num_decay_steps": {n_decay}, "decay_type": "linear"}}'
    found, _ = rates(small_census, tmp_path / "run", "--lr_scheduler_kwargs", arguments)
    assert found == pytest.approx([0, 5e-4, *[1e-3] * 5, 7.5e-4, 5e-4, 2.5e-4])


def test_a_run_that_ends_before_its_warm_up_is_warned_of(small_census, tmp_path, caplog):
    prepare(small_census, tmp_path / "enough", "--max_steps", "20", "--warmup_steps", "20")
    assert "--warmup_steps" not in caplog.text
    prepare(small_census, tmp_path / "short", "--max_steps", "20", "--warmup_steps", "200")
    assert "the run has 20 steps, but the learning rate rises for 200 (--warmup_steps)" in caplog.text
