"""Kill a training run again and again, resume it each time, and compare every step with a run that nobody killed.

  python benchmarks/kill_resume.py --kills 100                     one process, from SOMA, then from a cache of it
  python benchmarks/kill_resume.py --kills 20 --processes 2        two processes, killed one or both
  python benchmarks/kill_resume.py --kills 5 --data runs/blood_census --cells 2000

Each session is a process forked after the imports, which trains a tiny model and is sent SIGKILL after a random time:
in a step, in a validation, while a checkpoint is written. Every step leaves a line with its loss and the hashes of its
batch, the weights and the optimiser. All lines of all sessions must be those of the uninterrupted run, bit for bit, and
so must metrics.jsonl in the end, but for the clock. Dropout is on.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # no threads before the forks
os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
import torch
from measuring import write_result
from transformers import TrainerCallback

from scgpt_hf.cli.process import tune_process
from scgpt_hf.demo import demo_census
from scgpt_hf.pretraining import prepare_run
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.fault_tolerance.checkpoints import checkpoints_in
from scgpt_hf.training.recipe import make_trainer
from scgpt_hf.training.selection import save_selection
from scgpt_hf.training.settings_parsing import parse_settings

TINY = [
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "16"),
    *("--dropout", "0.1", "--use_cpu", "true", "--disable_tqdm", "true", "--chunks_per_window", "1"),
    *("--save_strategy", "steps", "--eval_strategy", "epoch", "--load_best_model_at_end", "false"),
    *("--logging_steps", "4", "--max_tokens", "65"),
]
MOST_STEPS = 24  # that a session may do until it is killed
IN_A_SAVE = 0.4  # share of the sessions that are killed while they write a checkpoint
CLOCK = ("seconds", "_per_second", "waiting_share")  # endings of what the clock says


class Trace(TrainerCallback):
    """Appends a line for each step: its loss, and the hashes of its batch, the weights and the optimiser."""

    def __init__(self, trainer: Any, path: Path) -> None:
        self.trainer, self.path, self.batch = trainer, path, ""
        take = trainer.get_batch_samples

        def remember(*arguments: Any) -> Any:
            batches, n_masked = take(*arguments)
            self.batch = digest(value for batch in batches for _, value in sorted(batch.items()))
            return batches, n_masked

        trainer.get_batch_samples = remember

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Append the line of a step."""
        optimizer = self.trainer.optimizer.optimizer
        line = {
            "step": state.global_step,
            "batch": self.batch,
            "loss": {name: float(share).hex() for name, share in self.trainer.losses.step_losses.items()},
            "weights": digest(self.trainer.model.state_dict().values()),
            "optimizer": digest(value for moments in optimizer.state.values() for value in moments.values()),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def digest(values: Iterable[Any]) -> str:
    """Return a hash of tensors and numbers, bit for bit."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return sha.hexdigest()[:16]


def train(flags: list[str], folder: Path, trace: Path) -> None:
    """Train as `scripts/pretrain.py` does, from the newest checkpoint if there is one."""
    tune_process()
    resume = ["--resume_from_checkpoint", "latest"] if checkpoints_in(folder) else []
    settings = parse_settings([*TINY, *flags, "--output_dir", str(folder), *resume], "")
    args, run = settings.training, prepare_run(settings)
    trainer = make_trainer(run.data_module, run.model, args)
    if args.process_index == 0 and run.checkpoint is None:
        save_selection(run.selection, run.source, settings)
    trainer.add_callback(Trace(trainer, trace.with_name(f"{trace.name}.{args.process_index}")))
    trainer.train(resume_from_checkpoint=run.checkpoint)


def warm_up() -> None:
    """Do once, without starting a thread, what every forked session would begin with: imports and compiled code."""
    importlib.import_module("scgpt_hf.cells.soma.census")
    importlib.import_module("scgpt_hf.cells.cache.reader")
    genes = [f"ENSG{number:011d}" for number in range(8)]
    ScGPTProcessor.from_genes(genes)(np.ones((2, 8), np.float32), genes)
    gc.collect()
    gc.freeze()  # or each session's first collection would copy the memory that it shares with this process


def fork(work: Callable[[], object], log: Path) -> int:
    """Start a process that does one thing and ends; return its id. What it says goes to a file."""
    if child := os.fork():
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 — the parent reads it
        traceback.print_exc()
    finally:
        os._exit(code)


def start(processes: int, flags: list[str], folder: Path, trace: Path) -> dict[int, Path]:
    """Start a session; return its processes and what each of them says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(processes):

        def work(rank: int = rank) -> None:
            if processes > 1:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ |= {key: str(value) for key, value in world.items()}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            train(flags, folder, trace)

        log = trace.with_name(f"log.{rank}")
        children[fork(work, log)] = log
    return children


def finish(children: dict[int, Path]) -> bool:
    """Wait for processes to end; return whether all did their work. One that fails otherwise than by a kill raises."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if -signal.SIGKILL not in codes:  # or others fail because they lost the one that was killed
        for code, log in zip(codes, children.values(), strict=True):
            if code:
                raise RuntimeError(f"a process failed:\n{log.read_text()[-4000:]}")
    return not any(codes)


def kill_sometime(children: dict[int, Path], folder: Path, trace: Path, chance: random.Random) -> str:
    """Kill some or all processes at a random moment of training; return when it was."""
    unfinished = folder / ".unfinished"
    wanted = steps_traced(trace) + chance.randint(0, MOST_STEPS)
    in_a_save, pause_s = chance.random() < IN_A_SAVE, chance.uniform(0, 0.03)
    while steps_traced(trace) < wanted or (in_a_save and not unfinished.exists()):
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            return "ended before"
        time.sleep(0.001)
    time.sleep(pause_s)
    moment = "while saving" if unfinished.exists() else "between saves"
    victims = list(children)
    for victim in chance.sample(victims, chance.randint(1, len(victims))):
        os.kill(victim, signal.SIGKILL)
    time.sleep(0.1 if len(victims) > 1 else 0)  # a launcher takes a moment to end the others
    for child in victims:
        os.kill(child, signal.SIGKILL)
    return moment


def steps_traced(trace: Path) -> int:
    """Return the steps that the first process has done so far, in all sessions."""
    path = trace.with_name(f"{trace.name}.0")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if not key.endswith(CLOCK)} for line in lines]


def train_whole(flags: list[str], processes: int, whole: Path) -> dict[int, dict[int, str]]:
    """Train without a kill; return the line of each step, by process."""
    trace = whole.with_suffix(".trace")
    if not finish(start(processes, flags, whole, trace)):
        raise RuntimeError("the uninterrupted run was killed")
    return {rank: {json.loads(line)["step"]: line for line in traced(trace, rank)} for rank in range(processes)}


def traced(trace: Path, rank: int) -> list[str]:
    """Return the lines that one process of a run has left, in all sessions, without one that a kill has cut."""
    path = trace.with_name(f"{trace.name}.{rank}")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.endswith("}")]


def require_same(folder: Path, whole: Path, expected: dict[int, dict[int, str]]) -> int:
    """Return how many steps of a killed run were compared with the whole one's; exit at the first that differs."""
    n_lines = 0
    for rank, lines in expected.items():
        found = traced(folder.with_suffix(".trace"), rank)
        n_lines += len(found)
        for line in found:
            step = json.loads(line)["step"]
            if line != lines[step]:
                raise SystemExit(f"step {step} differs:\n{line}\n{lines[step]}")
        if missing := lines.keys() - {json.loads(line)["step"] for line in found}:
            raise SystemExit(f"steps {sorted(missing)} were never done")
    if metrics(folder) != metrics(whole):
        raise SystemExit(f"metrics.jsonl differs: {folder} and {whole}")
    return n_lines


def begin_anew(folder: Path) -> bool:
    """Remove a run that was killed before its first checkpoint, as its error says; return whether it was."""
    hopeless = folder.exists() and not checkpoints_in(folder)
    if hopeless:
        shutil.rmtree(folder)
    return hopeless


def compare(flags: list[str], kills: int, processes: int, scratch: Path, chance: random.Random) -> dict[str, Any]:
    """Return what came of runs that were killed `kills` times in all; exits if any step differs."""
    whole, started = scratch / "whole", time.monotonic()
    expected = train_whole(flags, processes, whole)
    moments: Counter[str] = Counter()
    n_runs = n_lines = from_scratch = 0
    while (left := kills - moments["while saving"] - moments["between saves"]) > 0:
        n_runs += 1
        folder = scratch / f"killed-{n_runs}"
        trace, ended = folder.with_suffix(".trace"), False
        while not ended:
            from_scratch += begin_anew(folder)
            children = start(processes, flags, folder, trace)
            if left > 0:
                moments[kill_sometime(children, folder, trace, chance)] += 1
                left = kills - moments["while saving"] - moments["between saves"]
            ended = finish(children)
        n_lines += require_same(folder, whole, expected)
    return {
        "kills": dict(moments),
        "runs": n_runs,
        "steps_of_a_run": len(expected[0]),
        "steps_compared": n_lines,
        "begun_from_scratch": from_scratch,
        "different": 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def make_data(address: str, kind: str, scratch: Path) -> str:
    """Return the address of the cells: a SOMA, of the demo if none is given, or a cache of it."""
    if address == "demo":
        address = str(scratch / "demo_census")
        finish({fork(lambda: demo_census(Path(address)), scratch / "log"): scratch / "log"})
    if kind == "soma":
        return address

    def copy() -> None:
        from scgpt_hf.cells.cache.jobs import write_cache
        from scgpt_hf.cells.source import open_source

        write_cache(open_source(address), scratch / "cache")

    finish({fork(copy, scratch / "log"): scratch / "log"})
    return str(scratch / "cache")


def main() -> None:
    """Kill runs on SOMA and on a cache, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="sessions to kill, of each source")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--data", default="demo", help="a local SOMA; the demo's 700 cells when not given")
    parser.add_argument("--sources", nargs="+", choices=["soma", "cache"], default=["soma", "cache"])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16, help="cells of a step, of all processes together")
    parser.add_argument("--save_steps", type=int, default=7, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--no_report", action="store_true", help="print the result, write no JSON")
    asked = parser.parse_args()
    flags = ["--per_device_train_batch_size", str(asked.batch_size // asked.processes)]
    flags += ["--num_train_epochs", str(asked.epochs), "--save_steps", str(asked.save_steps)]
    warm_up()
    results = {}
    for kind in asked.sources:
        with tempfile.TemporaryDirectory() as name:
            data = make_data(asked.data, kind, Path(name))
            chance = random.Random(asked.seed)
            results[kind] = compare([*flags, "--data", data], asked.kills, asked.processes, Path(name), chance)
            print(kind, json.dumps(results[kind]), flush=True)
    if not asked.no_report:
        write_result(f"kill_resume_{asked.processes}", {"processes": asked.processes, "sources": results})


if __name__ == "__main__":
    main()
