"""Measure the training speed of scGPT's model (12 x 512): what the time is spent on, and what limits it next.

  python benchmarks/end_to_end.py                             # random tokens, no data: about 10 minutes on a GPU
  python benchmarks/end_to_end.py --data CACHE --minutes 5    # also scripts/pretrain.py, on a cache or a Census
  python benchmarks/end_to_end.py --device cpu --layers 2 --hidden_size 64 --batch_size 8 --batches 2 --repeats 1

All arms train alternately on the same cells. A step is forward, backward, clipping and AdamW. Speeds count real tokens,
without the padding that buckets add. The arms:

  eager                    bf16 autocast, fused AdamW
  eager_unfused            as eager, with PyTorch's default AdamW
  compiled                 torch.compile on bucketed batches, as pretrain.py does with --torch_compile true
  compiled_bf16_residual   as compiled, with LayerNorms that return bf16: an experiment, not in the package
  compiled_cuda_graphs     as compiled, in mode "reduce-overhead", for batches so small that kernel launches dominate

An arm that fails is reported and skipped. results/end_to_end_DEVICE.json is written after each mean length.
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_families import breakdown
from measuring import alternate, print_medians, write_result
from synthetic_tokens import pinned, sample_tokens
from training_step import StepConfig, TrainingStep, cells_per_second

from scgpt_hf.model.configuration_scgpt import ScGPTConfig, training_flops_per_token
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, bucket, pack
from scgpt_hf.training.throughput import peak_flops

ARMS = {
    "eager": StepConfig(),
    "eager_unfused": StepConfig(fused=False),
    "compiled": StepConfig(compiled="default"),
    "compiled_bf16_residual": StepConfig(compiled="default", bf16_residual=True),
    "compiled_cuda_graphs": StepConfig(compiled="reduce-overhead"),
}
TOKENS_PER_STEP = 65_536  # for an H100: 14 GB of activations, and about 25 ms per step, which hides kernel launches
EPOCHS, CELLS = 6, 300_000  # the run that is used for comparison, which took 81 minutes with the original code
SEED = 0
PRETRAIN = Path(__file__).resolve().parents[1] / "scripts" / "pretrain.py"


@dataclass(frozen=True)
class Work:
    """The work in one step, and the limit of the device.

    Attributes:
        cells: cells per step.
        mean_tokens: mean number of tokens per cell.
        flops_per_token: floating-point operations per token, forward and backward.
        peak_flops: peak of the device in bf16, in FLOP/s; None if unknown.
    """

    cells: int
    mean_tokens: float
    flops_per_token: float
    peak_flops: float | None


def main() -> None:
    """Measure each mean length and, with --data, a run of pretrain.py."""
    options = read_options()
    torch._dynamo.config.recompile_limit = (
        64  # all arms run the same code, and each model compiles it two or three times
    )
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    results: dict[str, Any] = {"device": name, "settings": vars(options) | {"data": None}}
    for mean_tokens in options.mean_tokens:
        results[f"mean_{mean_tokens}_tokens"] = measure(mean_tokens, options, device)
        write_result("end_to_end_" + re.sub(r"\W+", "_", name), results)
    if options.data:
        results["run"] = pretrain(options)
        write_result("end_to_end_" + re.sub(r"\W+", "_", name), results)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, type=int)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=str, default=device, help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    add("--arms", type=str, nargs="+", choices=ARMS, default=list(ARMS)[:4], help="default: all but CUDA graphs")
    add("--mean_tokens", nargs="+", default=[120, 450, 1026], help="mean tokens per cell (default: 120 450 1026)")
    add("--batch_size", default=0, help="cells per step; 0 for 65,536 tokens per step (default)")
    add("--batches", default=8, help="number of different batches (default: %(default)s)")
    add("--repeats", default=5, help="passes over all batches (default: %(default)s)")
    add("--layers", default=12, help="layers (default: %(default)s)")
    add("--hidden_size", default=512, help="width (default: %(default)s)")
    add("--n_genes", default=0, help="genes in the vocabulary; 0 for 1,200 with means up to 150, else 60,664 (default)")
    add("--precision", type=str, choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--data", type=str, nargs="+", help="cache, Census or .h5ad files for a run of scripts/pretrain.py")
    add("--minutes", type=float, default=5, help="approximate duration of that run (default: %(default)s)")
    add("--flags", type=str, default="", help='more flags for that run, e.g. "--gene_selection all"')
    return parser.parse_args()


def measure(mean_tokens: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the speed of every arm at one mean length, and what its time is spent on."""
    n_cells = options.batch_size or TOKENS_PER_STEP // mean_tokens
    n_genes = options.n_genes or (1200 if mean_tokens <= 150 else 60_664)
    rng = np.random.default_rng(SEED)
    batches = [sample_tokens(rng, n_cells, mean_tokens, n_genes) for _ in range(options.batches)]
    lengths = np.concatenate([np.diff(tokens.indptr) for tokens in batches])
    print(f"\n{n_cells} cells per step, {lengths.mean():.1f} tokens on average, {n_genes:,} genes")
    runs = {name: started for name in options.arms if (started := start(name, batches, n_genes, options, device))}
    rates = alternate({name: partial(cells_per_second, *run) for name, run in runs.items()}, options.repeats)
    if not rates:
        return {"failed": "all arms; see the errors above"}
    print_medians(rates, next(iter(rates)), "cells/s")
    model = next(iter(runs.values()))[0].model
    masked = float(np.mean([(tokens.labels != IGNORE).mean() for tokens in batches]))
    flops = training_flops_per_token(model.config, float((lengths**2).sum() / lengths.sum()), masked)
    work = Work(n_cells, float(lengths.mean()), flops, peak_flops(device))
    arms = {name: report(name, work, rate, *runs[name]) for name, rate in rates.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**asdict(work), "genes": n_genes, "parameters": parameters, "arms": arms}


def start(
    name: str, tokens: list[Tokens], n_genes: int, options: argparse.Namespace, device: torch.device
) -> tuple[TrainingStep, list[dict[str, Any]]] | None:
    """Return an arm after two passes over its batches, and the batches. Return None if it fails."""
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    step_config = StepConfig(**{**asdict(ARMS[name]), "bf16": precision == "bf16"})
    batches = [pack(one) for one in tokens]
    if step_config.compiled:
        batches = [bucket(batch, pad_id=n_genes, pad_value=-2.0) for batch in batches]
    for batch in batches:
        batch["num_items_in_batch"] = (batch["labels"] != IGNORE).sum().float()
    if device.type == "cuda":
        batches = [pinned(batch) for batch in batches]
    try:
        torch.manual_seed(SEED)
        config = ScGPTConfig(
            **{"vocab_size": n_genes + 2, "pad_token_id": n_genes, "num_hidden_layers": options.layers},
            **{"hidden_size": options.hidden_size, "intermediate_size": options.hidden_size},
            num_attention_heads=max(1, options.hidden_size // 64),
        )
        step = TrainingStep(ScGPTForPreTraining(config), device, step_config)
        for batch in [*batches, *batches]:
            loss = step(batch)
        if not math.isfinite(float(loss)):
            raise FloatingPointError(f"the loss is {float(loss)}")
    except Exception:  # noqa: BLE001 — the other arms are still measured
        print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return None
    return step, batches


def report(name: str, work: Work, rate: float, step: TrainingStep, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Print and return the speed of an arm in several units, and what its time is spent on."""
    endless = cycle(batches)
    families = breakdown(lambda: step(next(endless)), step.wait, seconds=work.cells / rate)
    tokens = rate * work.mean_tokens
    found: dict[str, Any] = {
        "cells_per_second": rate,
        "tokens_per_second": tokens,
        "step_ms": 1000 * work.cells / rate,
        "minutes_of_six_epochs_of_300k_cells": EPOCHS * CELLS / rate / 60,
        "share_of_time": families,
    }
    if work.peak_flops:
        useful = families.get("matrix products", 0.0) + families.get("attention", 0.0)
        found["mfu"] = tokens * work.flops_per_token / work.peak_flops
        found["mfu_within_products_and_attention"] = found["mfu"] / useful if useful else None
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated(step.device) / 1e9
    limit = next((family for family in families if family not in ("matrix products", "attention")), "none")
    print(f"\n{name}: {tokens:,.0f} tokens/s, {found['step_ms']:.1f} ms per step, six epochs of 300k cells in "
          f"{found['minutes_of_six_epochs_of_300k_cells']:.1f} min"
          + (f", {found['mfu']:.1%} of the peak" if work.peak_flops else "") + f"; next limit: {limit}")  # fmt: skip
    for family, share in families.items():
        print(f"  {family:<42} {share:6.1%}")
    return found


def pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Run scripts/pretrain.py for six epochs or for `--minutes`, and return medians over its log.

    Raises:
        RuntimeError: the run ended before it had logged enough lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *("--data", *options.data, "--output_dir", folder + "/run", "--gene_selection", "hvg"),
            *("--hidden_size", options.hidden_size, "--intermediate_size", options.hidden_size, "--dropout", 0.2),
            *("--num_hidden_layers", options.layers, "--num_attention_heads", max(1, options.hidden_size // 64)),
            *("--per_device_train_batch_size", options.batch_size or 512, "--num_train_epochs", EPOCHS),
            *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
            *(
                "--torch_compile",
                str(options.device != "cpu").lower(),
                "--use_cpu",
                str(options.device == "cpu").lower(),
            ),
            *("--logging_steps", 10, "--disable_tqdm", "true", *shlex.split(options.flags)),
        ]
        print("\npython scripts/pretrain.py " + " ".join(map(str, flags)))
        process = subprocess.Popen([sys.executable, str(PRETRAIN), *map(str, flags)])
        stop_at = math.inf
        while process.poll() is None and time.monotonic() < stop_at:
            time.sleep(0.5)
            if stop_at == math.inf and logged(folder):
                stop_at = time.monotonic() + 60 * options.minutes
        process.terminate()  # pretrain.py stops after its current step
        process.wait(300)
        lines = logged(folder)[2:]  # the first ones include compilation
    if not lines:
        raise RuntimeError(
            f"pretrain.py logged too few lines (exit code {process.returncode}): see above, or raise --minutes"
        )
    medians = {
        key: float(np.median([line[key] for line in lines]))
        for key in ("cells_per_second", "tokens_per_second", "waiting_share", "mfu")
        if key in lines[0]
    }
    print(", ".join(f"{key} {value:,.4g}" for key, value in medians.items()) + f"; medians of {len(lines)} log lines")
    minutes = EPOCHS * CELLS / medians["cells_per_second"] / 60
    return {"flags": options.flags, "log_lines": len(lines), **medians, "minutes_of_six_epochs_of_300k_cells": minutes}


def logged(folder: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have the training speed."""
    path = Path(folder) / "run" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "cells_per_second" in line]


if __name__ == "__main__":
    main()
