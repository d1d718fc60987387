"""Make masked views of cells: copies of a cell's tokens in which each requested gene is masked exactly once.

Pure functions on tokens; `expression.py` runs the model on the views.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from scgpt_hf.cells.block import Int64Array, to_offsets
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.randomness_scgpt import MASKING, cell_keys, random_words


def make_masked_views(
    tokens: Tokens, requested: Int64Array | None, processor: ScGPTProcessor, *, masked_share: float
) -> Iterator[Tokens]:
    """Yield views of each cell in which each requested gene is masked exactly once, a group of genes per view.

    The content of the cell decides which genes are masked together. If a cell has more genes than the model takes, each
    view shows as many visible genes as fit next to the masked ones, chosen in the same way.

    Args:
        tokens: all genes of each cell, unmasked, `<cls>` first.
        requested: vocabulary ids of the genes to mask in every cell, whether the cell expresses them or not; None masks
            the genes that each cell expresses.
        processor: holds the number of tokens that the model takes and the value of a masked gene.
        masked_share: most genes masked in one view, as a share of the cell's genes that fit; at least one gene is.

    Yields:
        Each view as the tokens of one cell: `<cls>`, the visible genes, the masked genes. The labels of masked genes
        are 0, because they mark where to predict and there is nothing to learn. `cell_ids` holds the number of the cell
        in `tokens`.
    """
    keys = cell_keys(tokens.cell_ids, seed=0, epoch=0, purpose=MASKING)
    n_genes = processor.max_tokens - 1  # `<cls>` takes one token
    # A loop over cells, because views differ in number and length; the model takes far longer.
    for cell, (start, stop) in enumerate(pairwise(tokens.indptr)):
        genes = np.argsort(random_words(keys[cell : cell + 1], tokens.input_ids[start + 1 : stop])) + start + 1
        expressed = tokens.input_ids[genes]
        n_masked = max(1, int(masked_share * min(len(genes), n_genes)))
        to_mask = expressed if requested is None else requested
        for first in range(0, len(to_mask), n_masked):
            masked = to_mask[first : first + n_masked]
            visible = np.concatenate([[start], genes[~np.isin(expressed, masked)][: n_genes - len(masked)]])
            input_ids = np.concatenate([tokens.input_ids[visible], masked])
            values = np.concatenate([tokens.values[visible], np.full(len(masked), processor.mask_value, np.float32)])
            labels = np.repeat(np.array([IGNORE, 0], np.float32), [len(visible), len(masked)])
            yield Tokens(input_ids, values, labels, np.array([0, len(input_ids)]), np.array([cell]))


def join_tokens(cells: Sequence[Tokens]) -> Tokens:
    """Concatenate labelled tokens of several cells."""
    lengths = [length for tokens in cells for length in np.diff(tokens.indptr)]
    return Tokens(
        np.concatenate([tokens.input_ids for tokens in cells]),
        np.concatenate([tokens.values for tokens in cells]),
        np.concatenate([tokens.labels for tokens in cells if tokens.labels is not None]),
        to_offsets(lengths),
        np.concatenate([tokens.cell_ids for tokens in cells]),
    )
