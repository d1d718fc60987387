"""Write tokens.npz: the results of every stage of `tokens/` for twenty handmade cells.

Run this script only if a change must alter these numbers, and give the reason in the commit message:

    python tests/golden/make_tokens.py
"""

from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from scgpt_hf.tokens.counts_scgpt import content_ids
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.randomness_scgpt import MASK_RATIO, MASKING, SAMPLING, TIES, cell_keys, random_words

GENES = [f"gene {i}" for i in range(30)]
COLUMNS = [*GENES[10:25], "unknown", *GENES[:10][::-1], "also unknown"]  # in another order, and incomplete
SEED, EPOCH = 17, 3


def handmade_counts() -> np.ndarray:
    """Return twenty cells with 27 genes; each tests a special case, see the comments. Shape (cells, genes)."""
    counts = np.zeros((20, 27), np.float32)
    counts[0, 3] = 1  # a single gene
    counts[1, [3, 4]] = 1, 1  # a tie across all bins
    counts[2, :4] = 1, 2, 3, 4  # no ties
    counts[3, 15] = 5  # an unknown gene only: dropped
    # cell 4 is empty: dropped
    counts[5] = 1  # every gene once
    counts[6] = np.arange(27)  # every value once, one zero
    counts[7] = np.arange(27)[::-1]
    counts[8, ::2] = 4095  # the last count of the table
    counts[9, ::2], counts[9, 1] = 4096, 1  # the first count beyond the table
    counts[10, ::3] = 2**24  # beyond it, float32 does not represent every integer
    counts[11, 1::3], counts[11, 2::3] = 1, 2
    counts[12] = counts[11]  # the same cell again
    counts[13, :20] = np.repeat([1, 2, 3, 10], 5)
    counts[14, 5:], counts[14, 26] = 1, 1000
    counts[15, :14] = 0.5  # from here on, values as in normalized layers
    counts[16, :8] = np.linspace(0.1, 7.3, 8)
    counts[17, 4:12] = np.log1p(np.arange(1, 9) * 1.5)
    counts[18, 20:] = 2.25, 2.25, 1, 1, 1, 0.125, 9
    counts[19, 9:16] = 1e-3
    return counts


def stages() -> dict[str, np.ndarray]:
    """Return the results of every stage by name."""
    block, cells = csr_matrix(handmade_counts()), np.arange(20) * 1000 - 5
    results: dict[str, np.ndarray] = {"counts": handmade_counts()}
    for name, purpose in (("ties", TIES), ("sampling", SAMPLING), ("masking", MASKING), ("ratio", MASK_RATIO)):
        keys = cell_keys(cells, seed=SEED, epoch=EPOCH, purpose=purpose)
        results |= {f"{name}/keys": keys, f"{name}/words": random_words(keys, np.arange(20))}
    variants = {
        "random": {"ties": "random"},
        "midpoint": {"ties": "midpoint", "n_bins": 11},
        "upper": {"ties": "upper"},
        "sampled": {"max_tokens": 9},
        "zeros": {"include_zeros": True, "cls_value": -2.0},
        "log1p": {"input_style": "log1p", "max_tokens": 12},
    }
    for name, changed in variants.items():
        processor = ScGPTProcessor.from_genes(GENES, **changed)
        gene_ids = processor.match_genes(COLUMNS)
        tokens = processor.tokenize(block, gene_ids, cell_ids=cells, seed=SEED, epoch=EPOCH)
        masked = processor.mask(tokens, seed=SEED, epoch=EPOCH)
        assert masked.labels is not None
        results |= {
            f"{name}/input_ids": tokens.input_ids,
            f"{name}/values": tokens.values,
            f"{name}/indptr": tokens.indptr,
            f"{name}/cell_ids": tokens.cell_ids,
            f"{name}/masked_values": masked.values,
            f"{name}/labels": masked.labels,
        }
    results["gene_ids"], results["content_ids"] = gene_ids, content_ids(block, gene_ids)
    return results


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("tokens.npz"), **stages())
