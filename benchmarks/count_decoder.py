"""Measure what the count decoder costs at 1,200, 5,000 and 60,000 genes: dense, and in chunks of genes.

  python benchmarks/count_decoder.py --threads 1 --repeats 3

A step is a forward and a backward pass of the decoder alone, on cells that express a twelfth of the genes, at most
2,000. `full` keeps the logits of all genes, as a plain softmax would; `chunked` is `CountHead.loss` as training calls
it, which chooses the chunks. Peak memory is measured in a new process for each arm, above what it had before the step.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import alternate, print_medians, write_result

from scgpt_hf.model import count_decoder_scgpt
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.count_decoder_scgpt import CountHead

N_GENES = (1_200, 5_000, 60_000)
CHUNKS = {"full": 2**62, "chunked": count_decoder_scgpt.MAX_LOGITS}  # logits at a time


def main() -> None:
    """Measure every number of genes and write results/count_decoder.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", type=int, default=[64, 512], help="cells per step (default: 64 512)")
    parser.add_argument("--domains", type=int, default=100, help="experimental batches (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each arm (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--peak", nargs=3, metavar=("ARM", "GENES", "CELLS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        arm, n_genes, n_cells = options.peak
        print(peak_memory(arm, int(n_genes), int(n_cells), options.domains))
        return
    results = {
        f"{n_genes} genes, {n_cells} cells": measure(n_genes, n_cells, options)
        for n_genes in N_GENES
        for n_cells in options.cells
    }
    write_result("count_decoder", {"settings": vars(options), **results})


def measure(n_genes: int, n_cells: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds and peak memory of a step of both arms."""
    step = make_step(n_genes, n_cells, options.domains)
    arms = {arm: partial(steps_per_second, step, arm) for arm in CHUNKS}
    for arm in arms.values():
        arm()  # warm up
    rates = alternate(arms, options.repeats)
    print(f"\n{n_genes:,} genes, {n_cells} cells")
    print_medians(rates, "full", "steps/s")
    command = [sys.executable, __file__, "--threads", str(options.threads), "--domains", str(options.domains)]
    peaks = {}
    for arm in CHUNKS:
        done = subprocess.run(
            [*command, "--peak", arm, str(n_genes), str(n_cells)], check=True, capture_output=True, text=True
        )
        peaks[arm] = round(float(done.stdout) / 2**20, 1)
    print(f"peak memory of a step in MiB: {peaks}")
    return {
        "milliseconds": {arm: round(1e3 / rate, 1) for arm, rate in rates.items()},
        "peak_mib": peaks,
        "mib_of_one_matrix_of_logits": round(n_cells * n_genes * 4 / 2**20, 1),
        "chunks": -(-n_genes // max(count_decoder_scgpt.MAX_LOGITS // n_cells, 1)),
        "parameters": sum(weight.numel() for weight in step[0].parameters()),
        "of_which_biases": options.domains * n_genes,
    }


def make_step(n_genes: int, n_cells: int, n_domains: int) -> tuple[CountHead, tuple[torch.Tensor, ...]]:
    """Return a decoder and the arguments of its loss for random cells."""
    torch.manual_seed(0)
    head = CountHead(ScGPTConfig(vocab_size=n_genes, pad_token_id=0, hidden_size=128, n_domains=n_domains))
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as after the first step of a training
    n_expressed = min(n_genes // 12, 2_000)
    ids = torch.stack([torch.randperm(n_genes)[:n_expressed].sort().values for _ in range(n_cells)]).flatten()
    cells = torch.arange(n_cells).repeat_interleave(n_expressed)
    embedding = torch.randn(n_cells, 128, requires_grad=True)
    return head, (embedding, torch.randint(n_domains, (n_cells,)), ids, torch.ones(len(ids)), cells)


def run_step(step: tuple[CountHead, tuple[torch.Tensor, ...]], arm: str) -> None:
    """Do a forward and a backward pass."""
    count_decoder_scgpt.MAX_LOGITS = CHUNKS[arm]
    head, arguments = step
    head.loss(*arguments).mean().backward()


def steps_per_second(step: tuple[CountHead, tuple[torch.Tensor, ...]], arm: str) -> float:
    """Return the rate of one step."""
    started = time.perf_counter()
    run_step(step, arm)
    return 1 / (time.perf_counter() - started)


def peak_memory(arm: str, n_genes: int, n_cells: int, n_domains: int) -> int:
    """Return by how many bytes a step raises the peak memory of this process."""
    step = make_step(n_genes, n_cells, n_domains)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present memory; Linux only
    before = memory_of_process("VmHWM")
    run_step(step, arm)
    return memory_of_process("VmHWM") - before


def memory_of_process(entry: str) -> int:
    """Return an entry of the status of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


if __name__ == "__main__":
    main()
