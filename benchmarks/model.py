"""Compare the speed of training on packed and on padded batches of the same cells.

  python benchmarks/model.py --data runs/blood_census
  python benchmarks/model.py --data a.h5ad b.h5ad --genes hvg --hidden_size 512 --layers 12 --batch_size 16
  python benchmarks/model.py --data runs/blood_census --device cuda --bf16

The lengths are those of the data: first with highly variable genes, then with all genes, sampled to --max_tokens. A
step is forward, backward, clipping and fused AdamW. Both arms have the same cells, masks and initial weights.
"""

import argparse
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from measuring import alternate, print_medians, write_result
from training_step import StepConfig, TrainingStep, cells_per_second

from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.model.configuration_scgpt import training_flops_per_token
from scgpt_hf.pipeline.stream import Batch, StreamConfig, lengths_of, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.recipe import build_model, build_processor
from scgpt_hf.training.selection import select_cells_and_genes
from scgpt_hf.training.settings import DataSettings, ModelSettings

SEED = 0


def main() -> None:
    """Measure each gene selection, print the medians and write results/model.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="a Census, a folder of a SOMA, or .h5ad files")
    parser.add_argument("--genes", nargs="+", choices=("hvg", "all"), default=["hvg", "all"], help="default: both")
    parser.add_argument(
        "--n_hvg", type=int, default=1200, help="number of highly variable genes (default: %(default)s)"
    )
    parser.add_argument(
        "--max_tokens", type=int, default=1201, help="highest number of tokens per cell (default: %(default)s)"
    )
    parser.add_argument("--hidden_size", type=int, default=128, help="width (default: %(default)s; scGPT: 512)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default: %(default)s; scGPT: 12)")
    parser.add_argument("--batch_size", type=int, default=32, help="cells per step (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="number of different batches (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="passes over all batches (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    source = open_source(options.data)
    results = {genes: measure(source, genes, options) for genes in options.genes}
    write_result("model", {"threads": torch.get_num_threads(), "settings": vars(options) | {"data": None}, **results})


def measure(source: CellSource, genes: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of both arms, their ratio, and the distribution of lengths for one gene selection."""
    data = DataSettings(gene_selection=genes, n_hvg=options.n_hvg, max_tokens=options.max_tokens)  # type: ignore[arg-type]
    selection = select_cells_and_genes(source, data, SEED)
    processor = build_processor(selection.genes, data)
    read = partial(read_batches, source, selection.parts["train"], processor, data, options)
    batches = {"packed": read(padded=False), "padded": read(padded=True)}
    steps = {name: new_step(processor, options) for name in batches}
    arms = {name: partial(cells_per_second, steps[name], batches[name]) for name in batches}
    for arm in arms.values():
        arm()  # warm up
    lengths = torch.cat([lengths_of(batch) for batch in batches["packed"]]).double()
    medians = alternate(arms, options.repeats)
    flops = training_flops_per_token(steps["packed"].model.config, float(lengths.square().sum() / lengths.sum()))
    shape = {
        "mean_tokens": float(lengths.mean()),
        "percentiles_5_50_95": np.percentile(lengths.numpy(), [5, 50, 95]).tolist(),
        "share_of_padding": 1 - float(lengths.sum()) / sum(batch["input_ids"].numel() for batch in batches["padded"]),
        "mflop_per_token": flops / 1e6,
    }
    print(f"\n{genes}: " + ", ".join(f"{name} {np.round(value, 2)}" for name, value in shape.items()))
    print_medians(medians, "padded", "cells/s")
    print_medians({name: rate * shape["mean_tokens"] for name, rate in medians.items()}, "padded", "tokens/s")
    return {"cells_per_second": medians, "packed_over_padded": medians["packed"] / medians["padded"], **shape}


def read_batches(
    source: CellSource,
    cell_ids: np.ndarray,
    processor: ScGPTProcessor,
    data: DataSettings,
    options: argparse.Namespace,
    *,
    padded: bool,
) -> list[Batch]:
    """Return the first masked batches of an epoch, packed or padded."""
    plan = plan_epoch(cell_ids, seed=SEED, epoch=0, batch_size=options.batch_size, chunk_size=source.chunk_size)
    settings = StreamConfig(SEED, mask_ratios=tuple(data.mask_ratios), padded=padded)
    return list(islice(stream_cells(source, [plan], processor, settings), options.batches))


def new_step(processor: ScGPTProcessor, options: argparse.Namespace) -> TrainingStep:
    """Return a training step for a model that always has the same initial weights."""
    torch.manual_seed(SEED)
    heads = max(1, options.hidden_size // 64)
    sizes = {"hidden_size": options.hidden_size, "intermediate_size": options.hidden_size, "dropout": 0.2}
    settings = ModelSettings(num_hidden_layers=options.layers, num_attention_heads=heads, **sizes)
    return TrainingStep(build_model(processor, settings), torch.device(options.device), StepConfig(bf16=options.bf16))


if __name__ == "__main__":
    main()
