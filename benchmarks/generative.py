"""Measure what generative training costs beside masked training, on the same cells and the same masks.

  python benchmarks/generative.py --threads 1
  python benchmarks/generative.py --device cuda --bf16 --hidden_size 512 --layers 12 --batch_size 64

A step is forward, backward, clipping and fused AdamW, on packed batches. `masked` predicts masked genes that are
tokens; `generative` asks for the same genes as queries, to which no other token attends; `two passes` adds the second
pass from the detached cell embedding (objective `gen`).
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import alternate, print_medians, ratios, write_result
from synthetic_tokens import pinned, sample_tokens
from training_step import StepConfig, TrainingStep, cells_per_second

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import pack

N_GENES = 5000
BOTH = {"gep": 1.0, "gepc": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "masked": {"loss_weights": BOTH},
    "generative": {"objective": "generative", "loss_weights": BOTH},
    "generative, two passes": {"objective": "generative", "loss_weights": BOTH | {"gen": 1.0}},
}


def main() -> None:
    """Measure every length and write results/generative.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean_tokens", nargs="+", type=int, default=[130, 600], help="default: 130 600")
    parser.add_argument("--hidden_size", type=int, default=128, help="width (default: %(default)s; scGPT: 512)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default: %(default)s; scGPT: 12)")
    parser.add_argument("--batch_size", type=int, default=32, help="cells per step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {f"{n_tokens} tokens": measure(n_tokens, options) for n_tokens in options.mean_tokens}
    write_result("generative", {"settings": vars(options), **results})


def measure(n_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of each arm in cells per second, and its ratio to masked training."""
    tokens = sample_tokens(np.random.default_rng(0), options.batch_size, n_tokens, N_GENES)
    arms = {}
    for name, settings in ARMS.items():
        batch = pack(tokens, queries="objective" in settings)
        step = make_step(settings, options)
        arms[name] = partial(cells_per_second, step, [pinned(batch) if options.device == "cuda" else batch] * 2)
        arms[name]()  # warm up
    medians = alternate(arms, options.repeats)
    print(f"\n{n_tokens} tokens per cell")
    print_medians(medians, "masked", "cells/s")
    return {"cells_per_second": medians, "ratio_to_masked": ratios(medians, "masked")}


def make_step(settings: dict[str, Any], options: argparse.Namespace) -> TrainingStep:
    """Return the training step of an arm; all arms start from the same random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden_size, "intermediate_size": options.hidden_size}
    heads = {"num_attention_heads": max(options.hidden_size // 64, 4), "num_hidden_layers": options.layers}
    config = ScGPTConfig(vocab_size=N_GENES + 2, pad_token_id=N_GENES, **sizes, **heads, **settings)
    return TrainingStep(ScGPTForPreTraining(config), torch.device(options.device), StepConfig(bf16=options.bf16))


if __name__ == "__main__":
    main()
