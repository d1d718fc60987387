"""Measure a GPU in one command within a time limit: is it correct, how fast is it, and what limits it?

  python benchmarks/gpu.py                                # at most 11 minutes
  python benchmarks/gpu.py --minutes 9 --out gpu.json     # for a loan of 10 minutes
  python benchmarks/gpu.py --device cpu --layers 2 --hidden_size 64 --mean_tokens 60 --batch_sizes 4 8 --arms eager

It needs torch, transformers, accelerate, numpy, scipy, pandas, pyarrow and pytest, and makes its data itself. Only the
part "trainer" and the tests of training also need `datasets`; without it they are skipped. Most valuable parts first:

  ceilings      a large copy and a large matrix product, which bound everything else
  correctness   pytest -m gpu tests/gpu
  steps         training steps on random tokens, by mean length, cells per step and arm: speed, share of the peak, peak
                memory, and the share of each family of kernels
  trainer       scripts/pretrain.py on a cache of random cells: speed, and the share of the time it waits for data

A part that no longer fits into the time is skipped, and listed as skipped. The JSON file is written after each part:
results/gpu_DEVICE.json, or `--out`. A step is forward, backward, clipping and AdamW, in bf16 on a GPU. Speeds count
real tokens, without the padding that buckets add. The arms:

  eager                    fused AdamW
  compiled                 torch.compile on bucketed batches, as pretrain.py does with --torch_compile true
  cuda_graphs              as compiled, in mode "reduce-overhead", for batches so small that kernel launches dominate
  compiled_bf16_residual   as compiled, with LayerNorms that return bf16: an experiment, not in the package
"""

import argparse
import gc
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kernel_families import profile_step
from measuring import write_result
from synthetic_tokens import pinned, sample_tokens
from trainer_speed import measure_trainer
from training_step import StepConfig, TrainingStep, cells_per_second

from scgpt_hf.model.configuration_scgpt import ScGPTConfig, training_flops_per_token
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import IGNORE, bucket, pack
from scgpt_hf.training.estimate.devices import Device, Mode, find_device
from scgpt_hf.training.estimate.predict import predict_step
from scgpt_hf.training.estimate.trace import Trace, trace_step
from scgpt_hf.training.throughput import peak_flops

ARMS = {
    "eager": StepConfig(),
    "compiled": StepConfig(compiled="default"),
    "cuda_graphs": StepConfig(compiled="reduce-overhead"),
    "compiled_bf16_residual": StepConfig(compiled="default", bf16_residual=True),
}
TOKENS_PER_STEP = 65_536  # enough to fill a GPU: about 25 ms per step on an H100, which hides kernel launches
TARGETS = {  # on one H100 or H200, 12 layers of width 512, bf16, mean length 120
    "cells_per_second": 22_000.0,
    "mfu": 0.35,
    "waiting_share": 0.02,  # at most
}
N_BATCHES = 4  # different batches of a setting
SEED = 0
ROOT = Path(__file__).resolve().parents[1]
# Expected seconds of a setting before one of its arm was measured; most of it is compilation.
FIRST_GUESS = {"eager": 15.0, "compiled": 90.0, "cuda_graphs": 90.0, "compiled_bf16_residual": 90.0}
TRAINER_SECONDS, CORRECTNESS_SECONDS = 30.0, 180.0


class Setting(NamedTuple):
    """What one measurement trains on."""

    mean_tokens: int
    batch_size: int
    arm: str


class Report:
    """The results so far, in a file that is written after each part, and the time that is left."""

    def __init__(self, path: Path | None, name: str, minutes: float, content: dict[str, Any]) -> None:
        self.path, self.name, self.content = path, name, content
        self.deadline = time.monotonic() + 60 * minutes
        self.content["skipped"] = []

    def seconds_left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()

    def run(self, part: str, needed: float, measure: Callable[[], Any]) -> Any:
        """Run a part if its time is left, and write the file. An error is recorded, and the next part runs.

        Args:
            part: name of the part.
            needed: seconds that it is expected to take.
            measure: returns its results.
        """
        if needed > self.seconds_left():
            self.content["skipped"].append(f"{part}: {needed:.0f} s needed, {max(self.seconds_left(), 0):.0f} s left")
            return self._write()
        started = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001 — the other parts are still measured
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        found = {**found, "seconds_of_part": round(time.monotonic() - started, 1)}
        self.content.setdefault("parts", {})[part] = found
        print(f"[{self.seconds_left():4.0f} s left] {part}: {_summary(found)}", flush=True)
        self._write()
        return found

    def _write(self) -> None:
        write_result(self.name, self.content, self.path)


def main() -> None:
    """Measure all parts, most valuable first, and compare with the targets."""
    options = read_options()
    torch._dynamo.config.recompile_limit = 64  # one code for all settings, compiled two or three times for each arm
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    report = Report(options.out, "gpu_" + re.sub(r"\W+", "_", name), options.minutes, {"device": name})
    report.content |= {"settings": vars(options) | {"out": None}, "targets": TARGETS}
    if device.type == "cuda":
        report.run("ceilings", 10, partial(measure_ceilings, device))
    report.run("correctness", 20, lambda: run_tests(min(CORRECTNESS_SECONDS, report.seconds_left())))
    durations: dict[str, float] = {}
    trainer_done = options.trainer == "false"
    for setting in settings_by_worth(options):
        if not trainer_done and (setting.mean_tokens, setting.batch_size) != headline(options):
            report.run("trainer", 90, partial(run_trainer, options, report))
            trainer_done = True
        found = report.run(
            part_name(setting),
            durations.get(setting.arm, FIRST_GUESS[setting.arm] if device.type == "cuda" else 0.0),
            partial(measure_setting, setting, options, device),
        )
        durations[setting.arm] = max(durations.get(setting.arm, 0.0), (found or {}).get("seconds_of_part", 0.0))
    if not trainer_done:
        report.run("trainer", 90, partial(run_trainer, options, report))
    if limits := find_device(name):
        report.run("predicted", 10, partial(add_predictions, report, options, limits))
    report.run("reached", 0, partial(compare_with_targets, report.content, options))
    print_table(report.content)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, type=int)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=str, default=device, help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    add("--minutes", type=float, default=11, help="time limit (default: %(default)s)")
    add("--out", type=Path, help="result file (default: results/gpu_DEVICE.json)")
    add("--arms", type=str, nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--mean_tokens", nargs="+", default=[120, 450, 1026], help="mean tokens per cell (default: 120 450 1026)")
    add("--batch_sizes", nargs="+", default=[32, 128, 512, 2048], help="cells per step (default: 32 128 512 2048)")
    add("--layers", default=12, help="layers (default: %(default)s)")
    add("--hidden_size", default=512, help="width (default: %(default)s)")
    add("--trainer", type=str, choices=("true", "false"), default="true", help="measure pretrain.py (default: true)")
    return parser.parse_args()


def part_name(setting: Setting) -> str:
    """Return the name of a setting in the file."""
    return "steps: {} tokens x {} cells, {}".format(*setting)


def n_genes_of(setting: Setting) -> int:
    """Return the size of the vocabulary: highly variable genes for short cells, all genes for long ones."""
    return 1200 if setting.mean_tokens <= 150 else 60_664


def make_config(setting: Setting, options: argparse.Namespace) -> ScGPTConfig:
    """Return the config of the model of a setting."""
    n_genes = n_genes_of(setting)
    return ScGPTConfig(
        **{"vocab_size": n_genes + 2, "pad_token_id": n_genes, "num_hidden_layers": options.layers},
        **{"hidden_size": options.hidden_size, "intermediate_size": options.hidden_size},
        num_attention_heads=max(1, options.hidden_size // 64),
    )


def headline(options: argparse.Namespace) -> tuple[int, int]:
    """Return mean length and cells per step of the target: the shortest cells, in the batch that fills a GPU."""
    mean = min(options.mean_tokens)
    return mean, min(options.batch_sizes, key=lambda cells: abs(math.log(cells * mean / TOKENS_PER_STEP)))


def settings_by_worth(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield all settings: the target, the smallest batch, full batches of other lengths, all others."""
    mean, cells = headline(options)
    full = {length: headline(argparse.Namespace(**vars(options) | {"mean_tokens": [length]}))[1]
            for length in options.mean_tokens}  # fmt: skip
    shapes = [(mean, cells), (mean, min(options.batch_sizes)), *full.items()]
    shapes += [(length, batch) for length in options.mean_tokens for batch in options.batch_sizes]
    main_arms = [arm for arm in options.arms if arm != "compiled_bf16_residual"]
    for length, batch in dict.fromkeys(shapes):
        # The GPU is so far behind the launches of a full batch that graphs gain nothing, and their memory is reserved.
        small = length * batch <= 1.5 * TOKENS_PER_STEP
        yield from (Setting(length, batch, arm) for arm in main_arms if small or arm != "cuda_graphs")
    yield from (Setting(mean, cells, arm) for arm in options.arms if arm not in main_arms)


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Return the rates of a device-to-device copy, counting both directions, and of a bf16 matrix product."""
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy_s, product_s = _time_on_gpu(lambda: target.copy_(source)), _time_on_gpu(lambda: left @ right)
    return {"copy_tb_per_s": 2 * source.nbytes / copy_s / 1e12, "bf16_tflop_per_s": 2 * 8192**3 / product_s / 1e12}


def run_tests(limit: float) -> dict[str, Any]:
    """Run the tests that need a GPU, and return their outcome."""
    # One process instead of several, and warnings of newer releases are no errors here.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-rfEs", "-p", "no:cacheprovider",
               "-o", "addopts=", "-W", "default"]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        return {"outcome": f"stopped after {limit:.0f} s", "output": str(error.stdout)[-3000:]}
    lines = [line for line in done.stdout.splitlines() if re.match(r"FAILED|ERROR|SKIPPED|E  ", line)]
    outcome = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
    return {"outcome": outcome[0], "exit_code": done.returncode, "lines": lines[:40]}


def measure_setting(setting: Setting, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the speed of one arm on batches of one shape, its memory, and what its time is spent on."""
    gc.collect()
    occupied = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        occupied = torch.cuda.memory_allocated(device)
    batches, shape = make_batches(setting, device)
    torch.manual_seed(SEED)
    config = make_config(setting, options)
    arm = replace(ARMS[setting.arm], bf16=device.type == "cuda")
    step = TrainingStep(ScGPTForPreTraining(config), device, arm)
    for batch in [*batches, *batches]:
        loss = float(step(batch))
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    rate = _median_rate(step, batches)
    endless = cycle(batches)
    profile = profile_step(lambda: step(next(endless)), step.wait, seconds=setting.batch_size / rate)
    flops = training_flops_per_token(config, shape["mean_length_seen"], shape["masked"])
    tokens = rate * shape["mean_tokens"]
    found = {
        **{"cells_per_second": rate, "tokens_per_second": tokens, "step_ms": 1000 * setting.batch_size / rate},
        **{"tflop_per_step": flops * shape["mean_tokens"] * setting.batch_size / 1e12, **shape},
        **{"kernels_per_step": profile.n_kernels, "share_of_time": profile.shares},
    }
    if device.type == "cuda":
        found["peak_memory_gb"] = (torch.cuda.max_memory_allocated(device) - occupied) / 1e9
    if peak := peak_flops(device):
        found["mfu"] = tokens * flops / peak
    return found


def make_batches(setting: Setting, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return some random batches as an arm reads them, and the mean lengths and share of masked tokens."""
    rng, n_genes = np.random.default_rng(SEED), n_genes_of(setting)
    tokens = [sample_tokens(rng, setting.batch_size, setting.mean_tokens, n_genes) for _ in range(N_BATCHES)]
    batches = [pack(one) for one in tokens]
    if ARMS[setting.arm].compiled:
        batches = [bucket(batch, pad_id=n_genes, pad_value=-2.0) for batch in batches]
    for batch in batches:
        batch["num_items_in_batch"] = (batch["labels"] != IGNORE).sum().float()
    lengths = np.concatenate([np.diff(one.indptr) for one in tokens]).astype(float)
    shape = {
        "mean_tokens": lengths.mean(),
        "mean_length_seen": np.square(lengths).sum() / lengths.sum(),  # over tokens, as attention sees it
        "masked": float(np.mean([(one.labels != IGNORE).mean() for one in tokens])),
    }
    return [pinned(batch) for batch in batches] if device.type == "cuda" else batches, shape


def run_trainer(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Train with scripts/pretrain.py on random cells in a cache, and return its speed and how long it waits."""
    from synthetic_cells import write_cells

    mean, cells = headline(options)
    flags = [
        *("--gene_selection", "all", "--min_genes", "1", "--hidden_size", options.hidden_size, "--shortcut_steps", "0"),
        *("--intermediate_size", options.hidden_size, "--num_hidden_layers", options.layers, "--cls_shortcut", "false"),
        *("--num_attention_heads", max(1, options.hidden_size // 64), "--loss_weights", '{"gep": 1, "gepc": 1}'),
        *("--per_device_train_batch_size", cells, "--torch_compile", str(options.device != "cpu").lower()),
        *("--use_cpu", str(options.device == "cpu").lower(), "--max_grad_norm", "1"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = write_cells(Path(folder) / "cells", max(20_000, 200 * cells), mean)
        limit = max(report.seconds_left() - 10, 30)
        return measure_trainer([str(data)], list(map(str, flags)), TRAINER_SECONDS, limit)


def add_predictions(report: Report, options: argparse.Namespace, limits: Device) -> dict[str, Any]:
    """Add to each measured setting the time that `scgpt_hf.training.estimate` predicts for it; see desk_model.py."""
    modes: dict[str, Mode] = {"eager": "eager", "compiled": "compiled", "cuda_graphs": "cuda_graphs"}
    traces: dict[tuple[int, int], Trace] = {}
    n_predicted = 0
    for setting in settings_by_worth(options):
        measured = report.content["parts"].get(part_name(setting), {})
        shape = setting[:2]
        if "step_ms" not in measured or setting.arm not in modes or report.seconds_left() < 15:
            continue
        if shape not in traces:
            config, (batches, found) = make_config(setting, options), make_batches(setting, torch.device("cpu"))
            squares = found["mean_length_seen"] * found["mean_tokens"] * setting.batch_size
            traces[shape] = trace_step(config, batches[0], squares)
        measured["predicted_ms"] = 1e3 * predict_step(traces[shape], limits, modes[setting.arm]).seconds
        n_predicted += 1
    return {"settings": n_predicted}


def compare_with_targets(content: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return for each target what was found, and whether it was reached; None if it was not measured."""
    parts = content.get("parts", {})
    named = "steps: {} tokens x {} cells, ".format(*headline(options))
    steps = [part for name, part in parts.items() if name.startswith(named)]

    def best(key: str) -> float | None:
        return max((part[key] for part in steps if key in part), default=None)

    waiting = parts.get("trainer", {}).get("waiting_share")
    found = {"cells_per_second": best("cells_per_second"), "mfu": best("mfu"), "waiting_share": waiting}
    reached = {
        name: None if value is None else value <= TARGETS[name] if name == "waiting_share" else value >= TARGETS[name]
        for name, value in found.items()
    }
    return {"found": found, "reached": reached}


def print_table(content: dict[str, Any]) -> None:
    """Print one line per setting, the skipped parts and the targets."""
    titles = "".join(f"{title:>10}" for title in ("cells/s", "ms", "predicted", "MFU", "GB", "kernels"))
    print(f"\n{content['device']}\n{'tokens x cells, arm':<46}{titles}")
    for name, part in content.get("parts", {}).items():
        if name.startswith("steps: ") and "step_ms" in part:
            numbers = [f"{part['cells_per_second']:,.0f}", f"{part['step_ms']:.1f}"]
            numbers += [f"{part['predicted_ms']:.1f}" if "predicted_ms" in part else ""]
            numbers += [f"{part['mfu']:.1%}" if "mfu" in part else ""]
            numbers += [f"{part['peak_memory_gb']:.1f}" if "peak_memory_gb" in part else ""]
            numbers += [f"{part['kernels_per_step']:,.0f}"]
            print(f"{name.removeprefix('steps: '):<46}" + "".join(f"{number:>10}" for number in numbers))
    for line in content["skipped"]:
        print(f"skipped {line}")
    print(f"targets {TARGETS}\nreached {content['parts']['reached']}")


def _median_rate(step: TrainingStep, batches: list[dict[str, Any]]) -> float:
    """Return the median speed of passes over all batches, cells/s: at least three, for about two seconds."""
    rates, started = [], time.monotonic()
    while len(rates) < 3 or (time.monotonic() - started < 2 and len(rates) < 50):
        rates.append(cells_per_second(step, batches))
    return statistics.median(rates)


def _time_on_gpu(run: Callable[[], object], repeats: int = 10) -> float:
    """Return the median seconds of a call, measured with events."""
    seconds = []
    for _ in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds[3:])


def _summary(found: dict[str, Any]) -> str:
    """Return the most important numbers of a part."""
    keys = ("failed", "outcome", "cells_per_second", "step_ms", "mfu", "peak_memory_gb", "waiting_share",
            "copy_tb_per_s", "bf16_tflop_per_s")  # fmt: skip
    texts = {key: f"{found[key]:,.4g}" if isinstance(found[key], float) else found[key] for key in keys if key in found}
    return ", ".join(f"{key} {text}" for key, text in texts.items())


if __name__ == "__main__":
    main()
