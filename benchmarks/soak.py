"""Check that memory, open files and threads do not grow over thousands of training steps.

  python benchmarks/soak.py runs/blood_census --steps 5000
  python benchmarks/soak.py runs/blood_census --steps 5000 --cells 4000 --out soak      fewer cells, more epochs

A tiny model trains on a SOMA for several epochs, with validations and checkpoints, as `pretrain.py` does. Every 50
steps the resident memory, the open files and the threads of the process are recorded. The first fifth of the run is
warm-up; after it, the slope of each is fitted. results/NAME.json has all values, results/NAME.png a figure.
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

STEPS_PER_SAMPLE = 50
UNITS = {"memory": "MB", "files": "open files", "threads": "threads"}


class Monitor(TrainerCallback):
    """Record (step, resident MB, open files, threads) every `STEPS_PER_SAMPLE` steps."""

    def __init__(self) -> None:
        """Start with no samples of this process."""
        self.samples: list[tuple[int, float, int, int]] = []
        self.process = psutil.Process()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record a sample if it is due."""
        if state.global_step % STEPS_PER_SAMPLE == 0:
            memory = self.process.memory_info().rss / 1e6
            self.samples.append((state.global_step, memory, self.process.num_fds(), self.process.num_threads()))


def measure_growth(samples: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the slope per 1,000 steps and the first and last values of each quantity, after warm-up."""
    late = samples[samples[:, 0] > samples[-1, 0] / 5]
    return {
        name: {
            "per_1000_steps": round(float(np.polyfit(late[:, 0], late[:, column], 1)[0] * 1000), 3),
            "median_of_first_tenth": float(np.median(late[: max(1, len(late) // 10), column])),
            "median_of_last_tenth": float(np.median(late[-max(1, len(late) // 10) :, column])),
            "highest": float(samples[:, column].max()),
        }
        for column, name in enumerate(UNITS, start=1)
    }


def draw(samples: np.ndarray, path: Path) -> None:
    """Draw each quantity over the steps."""
    figure, panels = plt.subplots(1, len(UNITS), figsize=(9, 2.5), layout="constrained")
    for column, (axes, unit) in enumerate(zip(panels, UNITS.values(), strict=True), start=1):
        axes.plot(samples[:, 0], samples[:, column], linewidth=1.2)
        axes.set(xlabel="step", ylabel=unit, ylim=(0, samples[:, column].max() * 1.1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, record, and write the results."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", help="local SOMA in the Census layout")
    parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--cells", type=int, default=4000, help="highest number of cells, sampled by donor (default: %(default)s)"
    )
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
        monitor = Monitor()
        trainer.add_callback(monitor)
        trainer.train()
        n_epochs, n_cells = trainer.state.epoch, len(run.selection.parts["train"])
    samples = np.array(monitor.samples, dtype=float)
    result = {"steps": options.steps, "train_cells": n_cells, "epochs": n_epochs, **measure_growth(samples)}
    write_result(options.out, {**result, "samples": samples.round(1).tolist()})
    draw(samples, RESULTS / f"{options.out}.png")
    for name, unit in UNITS.items():
        found = result[name]
        print(
            f"{unit:>12}: {found['per_1000_steps']:+.3f} per 1,000 steps after warm-up; "
            f"{found['median_of_first_tenth']:.0f} -> {found['median_of_last_tenth']:.0f}, "
            f"at most {found['highest']:.0f}"
        )
    print(f"{n_epochs:.0f} epochs of {n_cells:,} cells")


if __name__ == "__main__":
    main()
