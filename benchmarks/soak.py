"""See that memory, file handles and threads stay flat over thousands of training steps.

  python benchmarks/soak.py runs/blood_census --steps 5000
  python benchmarks/soak.py runs/blood_census --steps 5000 --cells 4000 --out soak      more epochs; other file names

A tiny model trains on a SOMA through several epochs, with validations and checkpoints, as `pretrain.py` would. Every
50 steps the resident memory, the open files and the threads of the process are noted. After the first fifth of the
run, which warms up, the slope of each is fitted; results/NAME.json holds all of it, results/NAME.png shows it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import psutil
from measuring import RESULTS, write_result
from transformers import TrainerCallback

from scgpt_hf.cli.process import tune_process
from scgpt_hf.pretraining import prepare_run
from scgpt_hf.training.recipe import make_trainer
from scgpt_hf.training.selection import save_selection
from scgpt_hf.training.settings_parsing import parse_settings

EVERY = 50
UNITS = {"memory": "MB", "files": "open files", "threads": "threads"}


class Watch(TrainerCallback):
    """Notes (step, resident MB, open files, threads) every `EVERY` steps."""

    def __init__(self) -> None:
        """Watch this process."""
        self.notes: list[tuple[int, float, int, int]] = []
        self.process = psutil.Process()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note."""
        if state.global_step % EVERY == 0:
            memory = self.process.memory_info().rss / 1e6
            self.notes.append((state.global_step, memory, self.process.num_fds(), self.process.num_threads()))


def flatness(notes: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the slope per 1,000 steps, begin and end of each figure, after the first fifth of the run."""
    late = notes[notes[:, 0] > notes[-1, 0] / 5]
    return {
        name: {
            "per_1000_steps": round(float(np.polyfit(late[:, 0], late[:, column], 1)[0] * 1000), 3),
            "median_of_first_tenth": float(np.median(late[: max(1, len(late) // 10), column])),
            "median_of_last_tenth": float(np.median(late[-max(1, len(late) // 10) :, column])),
            "highest": float(notes[:, column].max()),
        }
        for column, name in enumerate(UNITS, start=1)
    }


def draw(notes: np.ndarray, path: Path) -> None:
    """Draw each figure over the steps."""
    figure, panels = plt.subplots(1, len(UNITS), figsize=(9, 2.5), layout="constrained")
    for column, (axes, unit) in enumerate(zip(panels, UNITS.values(), strict=True), start=1):
        axes.plot(notes[:, 0], notes[:, column], linewidth=1.2)
        axes.set(xlabel="step", ylabel=unit, ylim=(0, notes[:, column].max() * 1.1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, watch, and write what was seen."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", help="local SOMA in the Census layout")
    parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=4000, help="cells at most, in whole donors (default: %(default)s)")
    parser.add_argument("--out", default="soak", help="name of the results (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            **{"data": options.census, "max_cells": options.cells, "output_dir": f"{folder}/run"},
            **{"max_steps": options.steps, "per_device_train_batch_size": 8, "max_tokens": 101, "use_cpu": "true"},
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
            **{"save_strategy": "steps", "save_steps": 500, "eval_strategy": "steps", "eval_steps": 500},
            **{"disable_tqdm": "true", "logging_steps": 100, "cpu_threads": 1},
        }
        settings = parse_settings([f"--{name}={value}" for name, value in flags.items()], "")
        run = prepare_run(settings)
        trainer = make_trainer(run.data_module, run.model, settings.training)
        save_selection(run.selection, run.source, settings)
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train()
        n_epochs, n_cells = trainer.state.epoch, len(run.selection.parts["train"])
    notes = np.array(watch.notes, dtype=float)
    result = {"steps": options.steps, "train_cells": n_cells, "epochs": n_epochs, **flatness(notes)}
    write_result(options.out, {**result, "notes": notes.round(1).tolist()})
    draw(notes, RESULTS / f"{options.out}.png")
    for name, unit in UNITS.items():
        seen = result[name]
        print(
            f"{unit:>12}: {seen['per_1000_steps']:+.3f} per 1,000 steps after warm-up; "
            f"{seen['median_of_first_tenth']:.0f} -> {seen['median_of_last_tenth']:.0f}, at most {seen['highest']:.0f}"
        )
    print(f"{n_epochs:.0f} epochs of {n_cells:,} cells")


if __name__ == "__main__":
    main()
