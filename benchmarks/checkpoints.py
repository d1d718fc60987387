"""Measure how long training stops for a checkpoint, in the foreground and in the background, by the size of the model.

  python benchmarks/checkpoints.py FOLDER                 50 million and a billion parameters
  python benchmarks/checkpoints.py FOLDER --sizes 50m

Each arm is a process that trains a model on the demo's cells with AdamW, and saves twice. The billion parameters and
their moments are bfloat16, so that weights, gradients, moments and the copy fit in 16 GB of memory: a checkpoint then
has 6 bytes per parameter instead of 12. FOLDER should be on the disk that runs are written to.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import peak_memory_gb, write_result
from transformers import TrainerCallback

from scgpt_hf.cli.process import tune_process
from scgpt_hf.demo import demo_census
from scgpt_hf.pretraining import prepare_run
from scgpt_hf.training.fault_tolerance import checkpoints
from scgpt_hf.training.recipe import make_trainer
from scgpt_hf.training.settings_parsing import parse_settings

SIZES = {
    "50m": {"hidden_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 2048},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 6144},
}
DTYPES = {"50m": torch.float32, "1b": torch.bfloat16}
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_tokens": 17,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "load_best_model_at_end": False,
    "shortcut_steps": 0,
    "logging_steps": 1,
    "chunks_per_window": 1,
    "validation_fraction": 0.1,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_total_limit": 2,
}
TICK_S = 0.01


class Clock(TrainerCallback):
    """Seconds of each step, of each stop for a checkpoint, and of the parts of saving."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.steps: list[tuple[float, bool]] = []  # seconds, and whether a checkpoint was being written
        self.saves: list[dict[str, float]] = []
        self.save_started = self.step_started = 0.0
        self.longest_pause = 0.0  # of a thread that only sleeps, while a checkpoint is written in the background
        trainer.write_checkpoint = self.timed_save(trainer.write_checkpoint)
        trainer._require_finite = self.timed("check_finite", trainer._require_finite)
        for name, part in (("_write_manifest", "hash"), ("flush_to_disk", "flush"), ("_replace", "rename")):
            setattr(checkpoints, name, self.timed(part, getattr(checkpoints, name)))
        if trainer.background is not None:
            copies, wait = trainer.background._copies, trainer.background.wait_for_copies
            copies.fill = self.timed("copy", copies.fill)
            trainer.background.wait_for_copies = self.timed("wait_for_copies", wait)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.parts[part].append(time.perf_counter() - started)
                if part == "rename":
                    self.saves[-1]["complete_s"] = time.perf_counter() - self.save_started

        return run

    def timed_save(self, save: Callable[..., None]) -> Callable[..., None]:
        """Return the function that saves a checkpoint, timed, after the one before is complete."""

        def run(write_files: Any) -> None:
            self.trainer.finish_checkpoint()
            self.saves.append({})
            self.save_started = time.perf_counter()
            save(write_files)
            self.saves[-1]["stop_s"] = time.perf_counter() - self.save_started

        return run

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of a step."""
        self.step_started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock of a step."""
        writing = bool(self.saves) and "complete_s" not in self.saves[-1]
        self.steps.append((time.perf_counter() - self.step_started, writing))

    def watch(self) -> None:
        """Measure the longest time that a thread did not get to run."""
        while True:
            started = time.perf_counter()
            time.sleep(TICK_S)
            if self.saves and "complete_s" not in self.saves[-1]:
                self.longest_pause = max(self.longest_pause, time.perf_counter() - started - TICK_S)


def measure(size: str, background: bool, folder: Path, steps: int) -> dict[str, Any]:
    """Train a model, save it twice, and return the times."""
    tune_process()
    run_folder = folder / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    settings = SETTINGS | SIZES[size] | {"max_steps": 2 * steps, "save_steps": steps, "save_in_background": background}
    settings |= {"data": str(demo_census(folder / "demo_census")), "output_dir": str(run_folder)}
    parsed = parse_settings([text for name, value in settings.items() for text in (f"--{name}", str(value))], "")
    run = prepare_run(parsed)
    model = run.model.to(DTYPES[size])
    trainer = make_trainer(run.data_module, model, parsed.training)
    trainer.add_callback(clock := Clock(trainer))
    threading.Thread(target=clock.watch, daemon=True).start()
    trainer.train()
    saved = checkpoints.newest_valid(run_folder)
    result = {
        "parameters": model.num_parameters(),
        "checkpoint_gb": sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) / 1e9,
        "saves": clock.saves,
        "parts_s": clock.parts,
        "step_s": sorted(seconds for seconds, writing in clock.steps if not writing),
        "step_while_writing_s": sorted(seconds for seconds, writing in clock.steps if writing),
        "longest_pause_s": clock.longest_pause if background else None,
        "peak_memory_gb": peak_memory_gb(),
    }
    shutil.rmtree(run_folder)
    return result


def main() -> None:
    """Measure each arm in a separate process, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--steps", type=int, default=3, help="steps between two checkpoints (default: %(default)s)")
    parser.add_argument("--arm", choices=["foreground", "background"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        result = measure(options.sizes[0], options.arm == "background", options.folder, options.steps)
        print("RESULT", json.dumps(result), flush=True)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        arms: dict[str, Any] = {}
        for arm in ("foreground", "background"):
            command = [sys.executable, __file__, str(options.folder), "--sizes", size, "--steps", str(options.steps)]
            done = subprocess.run([*command, "--arm", arm], stdout=subprocess.PIPE, text=True, check=True)
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            arms[arm] = json.loads(line.removeprefix("RESULT"))
            print(size, arm, json.dumps(arms[arm]), flush=True)
        write_result(f"checkpoints_{size}", arms)
    shutil.rmtree(options.folder / "demo_census", ignore_errors=True)


if __name__ == "__main__":
    main()
