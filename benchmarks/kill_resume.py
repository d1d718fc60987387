"""Kill a training run repeatedly, resume it each time, and compare every step with an uninterrupted run.

  python benchmarks/kill_resume.py --kills 100                     one process, data from a SOMA and from a cache of it
  python benchmarks/kill_resume.py --kills 20 --processes 2        two processes; kill one or both
  python benchmarks/kill_resume.py --kills 5 --data runs/blood_census

Each session is a process that is forked after the imports. It trains a tiny model, with dropout, and is killed with
SIGKILL at a random moment: in a step, in a validation, or while a checkpoint is written. Every step writes a line
with its loss and hashes of its batch, the weights and the optimizer. All lines of all sessions must equal those of
the uninterrupted run, bit for bit. So must metrics.jsonl at the end, except for times.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that forks must not have threads
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
MAX_STEPS = 24  # highest number of steps of a session before it is killed
SAVE_SHARE = 0.4  # share of the sessions that are killed while they write a checkpoint
TIME_SUFFIXES = ("seconds", "_per_second", "waiting_share")  # of metrics that differ between runs


class Trace(TrainerCallback):
    """Write a line for each step, with its loss and hashes of its batch, the weights and the optimizer."""

    def __init__(self, trainer: Any, path: Path) -> None:
        self.trainer, self.path, self.batch = trainer, path, ""
        take = trainer.get_batch_samples

        def remember(*arguments: Any) -> Any:
            batches, n_masked = take(*arguments)
            self.batch = digest(value for batch in batches for _, value in sorted(batch.items()))
            return batches, n_masked

        trainer.get_batch_samples = remember

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the line of a step."""
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
    """Hash tensors and numbers bit for bit."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return sha.hexdigest()[:16]


def train(flags: list[str], folder: Path, trace: Path) -> None:
    """Train as `scripts/pretrain.py` does, resuming from the newest checkpoint if there is one."""
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
    """Import and compile once, without starting a thread, what every forked session needs."""
    importlib.import_module("scgpt_hf.cells.soma.census")
    importlib.import_module("scgpt_hf.cells.cache.reader")
    genes = [f"ENSG{number:011d}" for number in range(8)]
    ScGPTProcessor.from_genes(genes)(np.ones((2, 8), np.float32), genes)
    gc.collect()
    gc.freeze()  # otherwise the first collection in each session would copy the memory it shares with this process


def fork(work: Callable[[], object], log: Path) -> int:
    """Run `work` in a forked process, write its output to a file, and return its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 — the parent reads it from the log
        traceback.print_exc()
    finally:
        os._exit(code)


def start(processes: int, flags: list[str], folder: Path, trace: Path) -> dict[int, Path]:
    """Start a session, and return the id and the log of each of its processes."""
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
    """Wait until all processes end, and return whether all finished. Raise if one failed without being killed."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if -signal.SIGKILL not in codes:  # otherwise the others fail because they lost the killed process
        for code, log in zip(codes, children.values(), strict=True):
            if code:
                raise RuntimeError(f"a process failed:\n{log.read_text()[-4000:]}")
    return not any(codes)


def kill_sometime(children: dict[int, Path], folder: Path, trace: Path, chance: random.Random) -> str:
    """Kill some or all processes at a random moment, and return when: saving, between saves, or too late."""
    unfinished = folder / ".unfinished"
    target = steps_traced(trace) + chance.randint(0, MAX_STEPS)
    in_save, pause_s = chance.random() < SAVE_SHARE, chance.uniform(0, 0.03)
    while steps_traced(trace) < target or (in_save and not unfinished.exists()):
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            return "finished before the kill"
        time.sleep(0.001)
    time.sleep(pause_s)
    moment = "while saving" if unfinished.exists() else "between saves"
    victims = list(children)
    for victim in chance.sample(victims, chance.randint(1, len(victims))):
        os.kill(victim, signal.SIGKILL)
    time.sleep(0.1 if len(victims) > 1 else 0)  # a launcher also takes a moment before it ends the others
    for child in victims:
        os.kill(child, signal.SIGKILL)
    return moment


def steps_traced(trace: Path) -> int:
    """Return the number of steps that the first process has done so far, in all sessions."""
    path = trace.with_name(f"{trace.name}.0")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if not key.endswith(TIME_SUFFIXES)} for line in lines]


def train_uninterrupted(flags: list[str], processes: int, folder: Path) -> dict[int, dict[int, str]]:
    """Train without a kill, and return rank → step → line of that step."""
    trace = folder.with_suffix(".trace")
    if not finish(start(processes, flags, folder, trace)):
        raise RuntimeError("the uninterrupted run was killed")
    return {rank: {json.loads(line)["step"]: line for line in traced(trace, rank)} for rank in range(processes)}


def traced(trace: Path, rank: int) -> list[str]:
    """Return the complete lines that one process of a run has written, in all sessions."""
    path = trace.with_name(f"{trace.name}.{rank}")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.endswith("}")]


def require_same(folder: Path, uninterrupted: Path, expected: dict[int, dict[int, str]]) -> int:
    """Compare a killed run with the uninterrupted one, and return the number of steps. Exit if they differ."""
    n_lines = 0
    for rank, lines in expected.items():
        found = traced(folder.with_suffix(".trace"), rank)
        n_lines += len(found)
        for line in found:
            step = json.loads(line)["step"]
            if line != lines[step]:
                raise SystemExit(f"step {step} differs:\n{line}\n{lines[step]}")
        if missing := lines.keys() - {json.loads(line)["step"] for line in found}:
            raise SystemExit(f"steps {sorted(missing)} were never trained")
    if metrics(folder) != metrics(uninterrupted):
        raise SystemExit(f"metrics.jsonl differs: {folder} and {uninterrupted}")
    return n_lines


def remove_unresumable(folder: Path) -> bool:
    """Remove a run that was killed before its first checkpoint, as its error says to do; return whether it was."""
    unresumable = folder.exists() and not checkpoints_in(folder)
    if unresumable:
        shutil.rmtree(folder)
    return unresumable


def compare(flags: list[str], kills: int, processes: int, scratch: Path, chance: random.Random) -> dict[str, Any]:
    """Kill runs `kills` times in all, and return counts. Exit if any step differs from the uninterrupted run."""
    uninterrupted, started = scratch / "uninterrupted", time.monotonic()
    expected = train_uninterrupted(flags, processes, uninterrupted)
    moments: Counter[str] = Counter()
    n_runs = n_lines = from_scratch = 0
    while (left := kills - moments["while saving"] - moments["between saves"]) > 0:
        n_runs += 1
        folder = scratch / f"killed-{n_runs}"
        trace, ended = folder.with_suffix(".trace"), False
        while not ended:
            from_scratch += remove_unresumable(folder)
            children = start(processes, flags, folder, trace)
            if left > 0:
                moments[kill_sometime(children, folder, trace, chance)] += 1
                left = kills - moments["while saving"] - moments["between saves"]
            ended = finish(children)
        n_lines += require_same(folder, uninterrupted, expected)
    return {
        "kills": dict(moments),
        "runs": n_runs,
        "steps_per_run": len(expected[0]),
        "steps_compared": n_lines,
        "started_from_scratch": from_scratch,
        "different": 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def make_data(address: str, kind: str, scratch: Path) -> str:
    """Return the address of the cells: a SOMA, by default that of the demo, or a cache of it."""
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
    """Kill runs that read a SOMA and runs that read a cache, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=100, help="sessions to kill, for each source (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes of a run (default: %(default)s)")
    parser.add_argument("--data", default="demo", help="local SOMA (default: the 700 cells of the demo)")
    parser.add_argument(
        "--sources", nargs="+", choices=["soma", "cache"], default=["soma", "cache"], help="default: both"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a run (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=16, help="cells per step, of all processes together (default: %(default)s)"
    )
    parser.add_argument("--save_steps", type=int, default=7, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--background", action="store_true", help="save with --save_in_background")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    parser.add_argument("--no_report", action="store_true", help="print the results, and do not write them to a file")
    options = parser.parse_args()
    flags = ["--per_device_train_batch_size", str(options.batch_size // options.processes)]
    flags += ["--num_train_epochs", str(options.epochs), "--save_steps", str(options.save_steps)]
    flags += ["--save_in_background", str(options.background)]
    warm_up()
    results = {}
    for kind in options.sources:
        with tempfile.TemporaryDirectory() as name:
            data = make_data(options.data, kind, Path(name))
            chance = random.Random(options.seed)
            results[kind] = compare([*flags, "--data", data], options.kills, options.processes, Path(name), chance)
            print(kind, json.dumps(results[kind]), flush=True)
    if not options.no_report:
        name = f"kill_resume_{options.processes}{'_background' if options.background else ''}"
        write_result(name, {"processes": options.processes, "sources": results})


if __name__ == "__main__":
    main()
