"""Predict the time and memory of a training step on an H100 and an H200, from a traced step. Nothing runs on a GPU.

  python benchmarks/desk_model.py                     # 12 layers of width 512, mean length 120; about two minutes
  python benchmarks/desk_model.py --mean_tokens 1026 --batch_sizes 32 256

The first table has FLOPs, bytes and kernels by part of the model, the second the predicted time, the third the
predicted memory by size of the model. `scgpt_hf/training/estimate` explains the model of a step and its assumptions.
"""

import argparse
import math
from collections import defaultdict
from typing import Any

import numpy as np
from measuring import write_result
from synthetic_tokens import sample_tokens

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.tokens.packing_scgpt import pack
from scgpt_hf.training.estimate.devices import DEVICES, MODES
from scgpt_hf.training.estimate.predict import USABLE_MEMORY, list_kernels, predict_step
from scgpt_hf.training.estimate.trace import Trace, trace_step

CELLS = 32  # of the traced batch, and of the seed's step
SIZES = ((12, 512), (24, 1024), (24, 1536), (36, 2048))  # layers, width
N_GENES = 60_664
TOKENS_PER_STEP = 65_536
GPUS = 8  # that share a model with FSDP2


def main() -> None:
    """Print the tables, and write results/desk_model.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean_tokens", type=int, default=120, help="mean tokens per cell (default: %(default)s)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 256, 512, 1024], help="cells per step")
    parser.add_argument("--n_genes", type=int, default=1200, help="vocabulary of the first tables")
    options = parser.parse_args()
    config = make_config(12, 512, options.n_genes)
    traces = {cells: trace(config, options.mean_tokens, cells) for cells in options.batch_sizes}
    result = {
        "predicted": True,
        "parts": parts(traces[min(traces)]),
        "times": times(traces),
        "memory": [memory(layers, width, options.mean_tokens) for layers, width in SIZES],
    }
    write_result("desk_model", {"settings": vars(options), **result})


def make_config(layers: int, width: int, n_genes: int) -> ScGPTConfig:
    """Return the config of a model with heads of width 64."""
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": width // 64}
    return ScGPTConfig(vocab_size=n_genes + 2, pad_token_id=n_genes, num_hidden_layers=layers, **sizes)


def trace(config: ScGPTConfig, mean_tokens: int, cells: int, **options: Any) -> Trace:
    """Trace a step on random cells."""
    tokens = sample_tokens(np.random.default_rng(0), CELLS, mean_tokens, config.vocab_size - 2)
    squares = float(np.square(np.diff(tokens.indptr).astype(float)).sum())
    return trace_step(config, pack(tokens), squares, scale=max(cells // CELLS, 1), **options)


def parts(one: Trace) -> dict[str, dict[str, float]]:
    """Print and return FLOPs, bytes and kernels of each part of the smallest batch; layers together."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("gflop", "mb", "kernels"), 0.0))
    for kernel in list_kernels(one, "eager"):
        row = found["layers" if kernel.part.startswith("layers") else kernel.part]
        row["gflop"] += kernel.flops / 1e9
        row["mb"] += kernel.n_bytes / 1e6
        row["kernels"] += kernel.n_launches
    print(f"\n{'eager, smallest batch':<24}{'GFLOP':>10}{'MB':>10}{'kernels':>10}")
    for name, row in found.items():
        print(f"{name:<24}{row['gflop']:>10,.1f}{row['mb']:>10,.0f}{row['kernels']:>10,.0f}")
    return dict(found)


def times(traces: dict[int, Trace]) -> list[dict[str, Any]]:
    """Print and return the predicted time of each batch size, device and mode."""
    rows = []
    print(f"\n{'predicted':<32}{'ms':>8}{'cells/s':>10}{'of peak':>9}{'kernels':>9}  limited by")
    for name in ("H100", "H200"):
        for cells, one in traces.items():
            for mode in MODES:
                step = predict_step(one, DEVICES[name], mode)
                row = {
                    **{"device": name, "cells": cells, "mode": mode, "ms": step.seconds * 1e3},
                    **{"cells_per_second": cells / step.seconds, "kernels": step.n_kernels},
                    "share_of_peak": one.flops / step.seconds / DEVICES[name].flops,
                    "limited_by": "host" if step.host_s > step.busy_s else "gpu",
                }
                rows.append(row)
                print(f"{f'{name} {cells:>5} cells {mode}':<32}{row['ms']:>8.1f}{row['cells_per_second']:>10,.0f}"
                      f"{row['share_of_peak']:>9.1%}{step.n_kernels:>9,}  {row['limited_by']}")  # fmt: skip
    return rows


def memory(layers: int, width: int, mean_tokens: int) -> dict[str, Any]:
    """Print and return the predicted memory of a model, and the largest batch on 80 and 141 GB."""
    config = make_config(layers, width, N_GENES)
    row: dict[str, Any] = {"layers": layers, "width": width}
    cells = CELLS * math.ceil(TOKENS_PER_STEP / mean_tokens / CELLS)
    for checkpointing in (False, True):
        one = trace(config, mean_tokens, cells, gradient_checkpointing=checkpointing)
        state = one.state_bytes
        per_cell = one.activation_bytes / cells
        # FSDP2 divides the state, and gathers two layers in bf16 beside it.
        sharded = state / GPUS + 2 * 2 * (4 * width**2 + 2 * width**2)
        found = {"state_gb": state / 1e9, "activations_gb": one.activation_bytes / 1e9, "cells": cells}
        for gigabytes in (80, 141):
            for name, held in (("one", state), (f"fsdp{GPUS}", sharded)):
                found[f"cells_{gigabytes}_gb_{name}"] = max(int((USABLE_MEMORY * gigabytes * 1e9 - held) / per_cell), 0)
        row["checkpointing" if checkpointing else "plain"] = found
        row["parameters"] = state // 16
        print(f"\n{layers} x {width}, {row['parameters'] / 1e6:,.0f} M parameters, "
              f"checkpointing {'on' if checkpointing else 'off'} (predicted)\n  "
              + ", ".join(f"{key} {value:,.1f}" for key, value in found.items()))  # fmt: skip
    return row


if __name__ == "__main__":
    main()
