"""What the model is shown of a cell and what it is asked: every gene hidden once, a group at a time.

Pure functions from a cell's tokens to looks at the cell; `expression.py` asks the model.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.randomness_scgpt import MASKING, cell_keys, random_words


def hide_in_turn(
    tokens: Tokens, asked: Int64Array | None, processor: ScGPTProcessor, *, share: float
) -> Iterator[Tokens]:
    """Yield looks at each cell, one by one, in which every gene asked for is hidden exactly once.

    The cell's content decides which genes are hidden together. Of a cell with more genes than the model takes, each
    look shows as many as fit beside the hidden ones, chosen alike.

    Args:
        tokens: all genes of each cell, unmasked, `<cls>` first.
        asked: genes to hide, vocabulary ids, whether the cell expresses them or not; None hides the cell's own.
        processor: says how many tokens a model takes, and the value of a hidden gene.
        share: most genes hidden at once, as a share of the cell's genes that fit; one gene always is.

    Returns:
        Each look as the tokens of one cell: `<cls>`, the genes seen, the genes hidden. Labels of the hidden ones are 0:
        they say where to predict, not what. `cell_ids` is the number of the cell in `tokens`.
    """
    keys = cell_keys(tokens.cell_ids, seed=0, epoch=0, purpose=MASKING)
    room = processor.max_tokens - 1
    for cell, (start, stop) in enumerate(pairwise(tokens.indptr)):  # the model takes far longer than this loop
        genes = np.argsort(random_words(keys[cell : cell + 1], tokens.input_ids[start + 1 : stop])) + start + 1
        own = tokens.input_ids[genes]
        n_hidden = max(1, int(share * min(len(genes), room)))
        wanted = own if asked is None else asked
        for first in range(0, len(wanted), n_hidden):
            hidden = wanted[first : first + n_hidden]
            seen = np.concatenate([[start], genes[~np.isin(own, hidden)][: room - len(hidden)]])
            input_ids = np.concatenate([tokens.input_ids[seen], hidden])
            values = np.concatenate([tokens.values[seen], np.full(len(hidden), processor.mask_value, np.float32)])
            labels = np.repeat(np.array([IGNORE, 0], np.float32), [len(seen), len(hidden)])
            yield Tokens(input_ids, values, labels, np.array([0, len(input_ids)]), np.array([cell]))


def join_tokens(cells: Sequence[Tokens]) -> Tokens:
    """Return labelled tokens of several cells as one."""
    lengths = [length for tokens in cells for length in np.diff(tokens.indptr)]
    return Tokens(
        np.concatenate([tokens.input_ids for tokens in cells]),
        np.concatenate([tokens.values for tokens in cells]),
        np.concatenate([tokens.labels for tokens in cells if tokens.labels is not None]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([tokens.cell_ids for tokens in cells]),
    )
