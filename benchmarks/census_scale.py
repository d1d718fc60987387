"""Measure what a run costs before its first step, on a Census of 1, 10 and 100 million cells.

  python benchmarks/census_scale.py FOLDER --cells 1000000 10000000 100000000

Each size is a Census of `large_census.py`: all of obs, and X of the chunks that are read here, in FOLDER, which is
removed in the end (3 GB for 100 million cells). A measurement that was stopped goes on where it was. Each task runs in
a separate process, and reports the seconds of its steps, its processor time and its peak memory:

- `human dry run`, `blood dry run`: `scgpt-hf pretrain human.yaml --dry_run`, and the same of blood_300k.yaml with
  --max_cells 20000, because what follows the sampling costs the same whatever the size of the Census.
- `new run`: the first steps of a run on human.yaml, one by one, up to the first batch.
- `train`: one step and a checkpoint; then `resume`: the first steps of a run that resumes from it.
- `native reader`: open X as it is in a Census of this size that `build-census` wrote, with a fragment for 8,192 cells.

The model is small, because its steps cost the same for all sizes. Steps that read all of X (the choice of genes with
--min_gene_counts) are left out of `new run`: they take the time of a scan, see `loader.py`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiledbsoma as soma
from measuring import RESULTS, peak_memory_gb, write_result

from scgpt_hf.cells.block import CHUNK_SIZE
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.selection.filters import cells_with_value, filter_cells, sample_donors
from scgpt_hf.cells.selection.splits import split_cells
from scgpt_hf.cells.soma.build import CELLS_PER_WRITE
from scgpt_hf.cells.soma.context import open_context
from scgpt_hf.cells.soma.native import open_native
from scgpt_hf.pretraining import describe_pretraining, prepare_run
from scgpt_hf.training import baselines
from scgpt_hf.training.recipe import make_trainer
from scgpt_hf.training.selection import open_cells, save_selection, select_cells_and_genes
from scgpt_hf.training.settings import Settings
from scgpt_hf.training.settings_parsing import parse_settings

RESULT = RESULTS / "census_scale.json"
TASKS = ("human dry run", "blood dry run", "new run", "native reader", "train", "resume")
SMALL = ["--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "32"]
# One donor validates: the validation cells are read before the first step, and grow with the cells.
HUMAN = ["human.yaml", "--validation_fraction", "0.00001", "--min_gene_counts", "0"]
BLOOD = ["blood_300k.yaml", "--max_cells", "20000"]


def settings_of(task: str, folder: Path) -> Settings:
    """Return the settings with which a task runs."""
    flags = ["--data", str(folder / "census"), "--output_dir", str(folder / "run"), "--use_cpu", "true"]
    if task == "human dry run":
        return parse_settings(["human.yaml", *flags, *SMALL, "--dry_run", "true"])
    if task == "blood dry run":
        return parse_settings([*BLOOD, *flags, *SMALL, "--dry_run", "true"])
    steps = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1" if task == "train" else "2"]
    quiet = ["--disable_tqdm", "true", "--load_best_model_at_end", "false"]
    resume = ["--resume_from_checkpoint", "true"] if task == "resume" else []
    return parse_settings([*HUMAN, *flags, *SMALL, *steps, *quiet, *resume])


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add the seconds of a step."""
    started = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0) + time.perf_counter() - started


def run_task(task: str, folder: Path, n_cells: int) -> dict[str, float]:
    """Run a task, and return the seconds of its steps."""
    seconds: dict[str, float] = {}
    settings = settings_of(task, folder)
    if task == "write":
        from large_census import write_obs

        with timed(seconds, "write obs"):
            write_obs(folder / "census", n_cells)
    elif task == "write chunks":
        from large_census import write_chunks

        with timed(seconds, "write chunks"):
            write_chunks(folder / "census", chunks_to_read(folder))
    elif task.endswith("dry run"):
        with timed(seconds, "all"):
            print(describe_pretraining(settings))
    elif task == "new run":
        start_run(settings, seconds)
    elif task == "train":
        baselines.BASELINE_CELLS = 1000  # of the first window, whose cells have counts
        with timed(seconds, "prepare"):
            run = prepare_run(settings)
        with timed(seconds, "train"):
            trainer = make_trainer(run.data_module, run.model, settings.training)
            trainer.train()
        with timed(seconds, "save selection"):
            save_selection(run.selection, run.source, settings)
    elif task == "resume":
        with timed(seconds, "prepare"):
            run = prepare_run(settings)
        with timed(seconds, "first batch"):
            next(iter(run.data_module.train(1)))
    else:
        with timed(seconds, "open"):
            open_fragments(folder, n_cells, seconds)
    return seconds


def start_run(settings: Settings, seconds: dict[str, float]) -> None:
    """Do the steps of a new run one by one, as `prepare_run` does, and sample half of the cells besides."""
    data, seed = settings.data, settings.training.seed
    with timed(seconds, "open"):
        source = open_cells(settings)
    with timed(seconds, "filter obs"):
        obs = source.obs([data.donor_key])
        cells_with_value(obs, data.donor_key)
    with timed(seconds, "sample donors"):
        sample_donors(obs, len(obs) // 2, seed=seed, donor_key=data.donor_key)
    with timed(seconds, "min_genes"):
        filter_cells(source, obs.index.to_numpy(np.int64), data.min_genes)
    with timed(seconds, "split"):
        split_cells(obs, {"train": 0.997, "validation": 0.003}, seed=seed, donor_key=data.donor_key)
    with timed(seconds, "plan"):
        plan_epoch(obs.index.to_numpy(np.int64), seed=seed, epoch=0, batch_size=512)
    del obs, source
    with timed(seconds, "prepare"):  # all of the above, with the model
        run = prepare_run(settings)
    with timed(seconds, "first batch"):
        next(iter(run.data_module.train(0)))


def open_fragments(folder: Path, n_cells: int, seconds: dict[str, float]) -> None:
    """Open X with as many fragments as a build writes, by links to one of them, and find cells in it."""
    raw = folder / "census/census_data/homo_sapiens/ms/RNA/X/raw"
    many = folder / "fragments"
    shutil.copytree(raw, many, ignore=shutil.ignore_patterns("__fragments", "__commits"))
    first = min((raw / "__fragments").iterdir())
    for number in range(n_cells // CELLS_PER_WRITE):
        name = f"__1_{number + 1}_{number:032x}_{first.name.rsplit('_', 1)[1]}"
        shutil.copytree(first, many / "__fragments" / name, copy_function=os.link)
        (many / "__commits").mkdir(exist_ok=True)
        (many / "__commits" / f"{name}.wrt").touch()
    with soma.SparseNDArray.open(str(many), context=open_context(False, n_threads=1)) as array, timed(seconds, "open"):
        native = open_native(array)
    assert native is not None
    assert len(native.fragments) == n_cells // CELLS_PER_WRITE
    with timed(seconds, "find cells 1,000 times"):
        for _ in range(1000):
            list(native.read_entries(n_cells - 1, n_cells - 1))


def chunks_to_read(folder: Path) -> set[int]:
    """Return the chunks of cells whose counts the tasks read."""
    wanted = []
    for task in TASKS[:3]:
        settings = settings_of(task, folder)
        data, args = settings.data, settings.training
        data.min_gene_counts, data.gene_selection = 0, "all"  # so that nothing is read to select the cells
        source = open_cells(settings)
        parts = select_cells_and_genes(source, data, args.seed).parts
        if task == "blood dry run":
            wanted += list(parts.values())
            continue
        if task == "new run":
            wanted.append(parts["validation"])
        order: dict[str, Any] = {"seed": args.seed, "epoch": 0, "chunk_size": source.chunk_size}
        for size in (args.global_batch_size, 1):  # the first batches, and the cells to choose genes on
            wanted.append(plan_epoch(parts["train"], batch_size=size, **order).window(0))
    return set(np.unique(np.concatenate([ids.ravel() for ids in wanted]) // CHUNK_SIZE).tolist())


def measure(task: str, folder: Path, n_cells: int) -> dict[str, Any]:
    """Run a task in a separate process, and return its seconds and peak memory."""
    command = [sys.executable, __file__, str(folder), "--cells", str(n_cells), "--task", task]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *shown, last = done.stdout.strip().splitlines()
    print("\n".join([f"{n_cells:,} cells, {task}", *shown, last]), flush=True)
    result: dict[str, Any] = json.loads(last)
    return result


def main() -> None:
    """Measure all sizes, or run one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the data")
    parser.add_argument("--cells", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="sizes of the Census")
    parser.add_argument("--task", help="run only this task, in this process")
    arguments = parser.parse_args()
    if arguments.task:
        seconds = run_task(arguments.task, arguments.folder, arguments.cells[0])
        print(json.dumps({"seconds": seconds, "cpu_s": time.process_time(), "peak_gb": peak_memory_gb()}))
        return
    results = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else {}
    for n_cells in arguments.cells:
        folder = arguments.folder / str(n_cells)
        folder.mkdir(parents=True, exist_ok=True)
        found = results.setdefault(str(n_cells), {})
        for task in ("write", "write chunks", *TASKS):
            if task not in found:  # a measurement that was stopped goes on where it was
                found[task] = measure(task, folder, n_cells)
                write_result("census_scale", {"cells": results})
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
