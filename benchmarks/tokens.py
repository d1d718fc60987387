"""Compare the speed of the compiled tokenizer (bin, sample, mask, pack) with NumPy that works cell by cell.

  python benchmarks/synthetic_census.py blood_20k --cells 20000
  python benchmarks/tokens.py blood_20k

All genes of the Census are in the vocabulary. There are 51 bins, up to 1,200 genes per cell, and 25, 50 or 75 % are
masked. The NumPy arm does the same steps in the same order, each with one call of `np.sort`, `np.searchsorted` or
`np.partition`. Its results must be equal to those of the compiled arm, bit for bit. Threads take 512 cells at a time.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from measuring import alternate, print_medians, ratios, write_result

from scgpt_hf.cells.block import CellBlock
from scgpt_hf.cells.source import open_source
from scgpt_hf.cells.threads import n_cores
from scgpt_hf.cli.process import tune_process
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.tokens.binning_scgpt import bin_cell
from scgpt_hf.tokens.masking_scgpt import sample_mask_ratios
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, pack
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.randomness_scgpt import MASKING, SAMPLING, TIES, cell_keys, random_words

BATCH, CELLS_PER_CALL, SEED, EPOCH, RATIOS = 32, 512, 0, 0, (0.25, 0.5, 0.75)


def compiled(
    counts: CellBlock, cell_ids: np.ndarray, gene_ids: np.ndarray, processor: ScGPTProcessor, first: int
) -> list[dict]:
    """Return the batches of `CELLS_PER_CALL` cells from `first` on, as the pipeline makes them."""
    cells = slice(first, min(first + CELLS_PER_CALL, len(cell_ids)))
    part = counts.take(np.arange(cells.start, cells.stop))
    tokens = processor.tokenize(part, gene_ids, cell_ids=cell_ids[cells], seed=SEED, epoch=EPOCH)
    tokens = processor.mask(tokens, seed=SEED, epoch=EPOCH, ratios=RATIOS)
    return [pack(tokens[start : start + BATCH]) for start in range(0, len(tokens), BATCH)]


def cell_by_cell(block: CellBlock, gene_ids: np.ndarray, processor: ScGPTProcessor, first: int) -> list[dict]:
    """Return the same batches, computed with NumPy."""
    ids = block.cell_ids[first : first + CELLS_PER_CALL]
    keys = [cell_keys(ids, seed=SEED, epoch=EPOCH, purpose=purpose) for purpose in (TIES, SAMPLING, MASKING)]
    mask_ratios = sample_mask_ratios(ids, RATIOS, seed=SEED, epoch=EPOCH)
    counts = block.counts
    cells = []
    for cell in range(len(ids)):
        stored = slice(*counts.indptr[first + cell : first + cell + 2])
        own_keys = [purpose[cell : cell + 1] for purpose in keys]
        cells.append(tokens_of_cell(counts.indices[stored], counts.data[stored], gene_ids, processor, own_keys,
                                    mask_ratios[cell]))  # fmt: skip
    batches = []
    for start in range(0, len(ids), BATCH):
        arrays = [np.concatenate(parts) for parts in zip(*cells[start : start + BATCH], strict=True)]
        lengths = [len(genes) for genes, _, _ in cells[start : start + BATCH]]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        batches.append(pack(Tokens(*arrays, indptr, ids[start : start + BATCH])))
    return batches


def tokens_of_cell(
    columns: np.ndarray, counts: np.ndarray, gene_ids: np.ndarray, processor: ScGPTProcessor, keys: list, ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, values and labels of one cell, with `<cls>` first. Shapes (tokens,)."""
    genes = gene_ids[columns]
    known = (genes >= 0) & (counts > 0)
    genes, values = genes[known], counts[known]
    order = np.argsort(genes)
    genes, values = genes[order], values[order]
    bins = bin_cell(values, genes, keys[0], processor.n_bins, processor.ties)
    if len(genes) > processor.max_tokens - 1:
        words = random_words(keys[1], genes)
        sampled = words <= np.partition(words, processor.max_tokens - 2)[processor.max_tokens - 2]
        genes, bins = genes[sampled], bins[sampled]
    masked = np.zeros(len(genes), np.bool_)
    if n_masked := int(ratio * len(genes)):
        words = random_words(keys[2], genes)
        masked = words <= np.partition(words, n_masked - 1)[n_masked - 1]
    values = np.where(masked, np.float32(processor.mask_value), bins)
    labels = np.where(masked, bins, np.float32(IGNORE))
    return (
        np.concatenate([[processor.cls_id], genes]),
        np.concatenate([[np.float32(processor.cls_value)], values]),
        np.concatenate([[np.float32(IGNORE)], labels]),
    )


def rate(make: Callable[[int], list[dict]], n_cells: int, n_threads: int = 1) -> float:
    """Return cells per second of making the batches of the first `n_cells` cells."""

    def make_and_drop(first: int) -> None:
        make(first)  # the result is dropped, or the batches of all cells would fill the memory

    started = time.perf_counter()
    if n_threads == 1:
        for first in range(0, n_cells, CELLS_PER_CALL):
            make_and_drop(first)
    else:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(make_and_drop, range(0, n_cells, CELLS_PER_CALL)))
    return n_cells / (time.perf_counter() - started)


def main() -> None:
    """Check that results are equal, measure the arms and write results/tokens.json."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder written by synthetic_census.py")
    parser.add_argument(
        "--cells",
        type=int,
        default=16_384,
        help="cells, sampled at random; NumPy gets a quarter of them (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each arm (default: %(default)s)")
    arguments = parser.parse_args()
    source = open_source(arguments.census)
    offered = source.obs().index.to_numpy()
    n_cells = min(arguments.cells, len(offered)) // CELLS_PER_CALL * CELLS_PER_CALL
    block = source.read(np.random.default_rng(0).permutation(offered)[:n_cells])
    processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())
    gene_ids, _ = match_source_genes(source.genes, processor)
    numpy_arm = partial(cell_by_cell, block, gene_ids, processor)
    compiled_arm = partial(compiled, block.take(np.arange(n_cells)), block.cell_ids, gene_ids, processor)
    for one, other in zip(compiled_arm(0), numpy_arm(0), strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in ("input_ids", "values", "labels", "cu_seq_lens_q"))

    arms = {
        "NumPy, cell by cell": partial(
            rate, numpy_arm, max(CELLS_PER_CALL, n_cells // 4 // CELLS_PER_CALL * CELLS_PER_CALL)
        )
    }
    for n_threads in [n for n in (1, 2, 4) if n <= n_cores()]:
        arms[f"compiled, {n_threads} threads"] = partial(rate, compiled_arm, n_cells, n_threads)
    medians = alternate(arms, arguments.repeats)
    print_medians(medians, "NumPy, cell by cell", "cells/s")
    genes_per_cell = block.counts.nnz / n_cells
    ratio = ratios(medians, "NumPy, cell by cell")
    write_result("tokens", {"genes_per_cell": genes_per_cell, "cells_per_s": medians, "ratio": ratio})


if __name__ == "__main__":
    main()
