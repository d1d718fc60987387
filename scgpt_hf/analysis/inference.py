"""Any scGPT model over any cells, in inference mode and without chance, so that a result depends on the cell alone.

Cells go through the processor as in pretraining, without masks: ties take the middle of their bins, and a cell with too
many genes is sampled by its own content. What is computed is decided next door, in `embed.py` and `annotate.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from copy import copy
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from scgpt_hf.cells.block import Int64Array, require_counts
from scgpt_hf.cells.schedule.epoch import CHUNK_SIZE, plan_validation
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.pipeline.genes import match_columns
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.pretrained import domain_classes, require_pair
from scgpt_hf.tokens.packing_scgpt import pack, pad
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

Float32Array = npt.NDArray[np.float32]


class RunSettings(TypedDict, total=False):
    """How a model runs over cells; what is left out takes the default.

    Attributes:
        batch_size: cells the model takes at once, 64 by default; changes speed and memory, not the result.
        empty: cells that express no gene the model knows are an error, "raise" (default), or a row of NaN, "nan".
        progress: show a bar, true by default.
    """

    batch_size: int
    empty: Literal["raise", "nan"]
    progress: bool


@torch.inference_mode()
def run_batches(
    compute: Callable[[Batch], torch.Tensor],
    source: CellSource,
    cell_ids: Int64Array,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    *,
    batch_size: int = 64,
    empty: Literal["raise", "nan"] = "raise",
    progress: bool = True,
    doing: str = "embedding",
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Yield positions in `cell_ids`, which ascend, and what is computed of these cells; empty cells are passed over.

    Args:
        compute: from a batch on the model's device to one row for each of its cells.
        source: as for `embed_cells`, and so on.
        cell_ids: ascending.
        model: whose parts `compute` runs; it is in inference mode meanwhile.
        processor: the model's.
        batch_size: see `RunSettings`.
        empty: see `RunSettings`.
        progress: see `RunSettings`.
        doing: what the bar says.

    Raises:
        ValueError: as `embed_anndata`.
    """
    require_pair(model, processor)
    if not len(cell_ids):
        return
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    config: Any = model.config
    batches = prefetch(_read_batches(source, cell_ids, config, processor, batch_size, empty))
    try:
        with closing(batches), tqdm(total=len(cell_ids), unit="cell", desc=doing, disable=not progress) as bar:
            for batch in batches:
                positions = np.asarray(batch.pop("positions"))
                rows = compute({k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
                bar.update(len(positions))
                yield positions, rows.cpu().numpy()
    finally:
        if training:
            model.train()


def _read_batches(
    source: CellSource,
    cell_ids: Int64Array,
    config: ScGPTConfig,
    processor: ScGPTProcessor,
    batch_size: int,
    empty: str,
) -> Iterator[Batch]:
    """Yield batches of the cells that are not empty, each with the `positions` of its cells in `cell_ids`.

    Packed, or padded for the models that count padding; with `domain_ids` for those that need them. Not `stream_cells`:
    that keys samples by cell id, and these ids are row numbers, which change when a file is cut.
    """
    plan = plan_validation(cell_ids, batch_size, cells_per_window=CHUNK_SIZE)
    processor = copy(processor)
    processor.ties = "midpoint"
    gene_ids, _ = match_columns(source.genes, processor)
    domains = domain_classes(config)
    columns = [column for column, _ in domains.values()]
    first = 0
    for index in range(plan.n_windows):
        ids = np.concatenate(plan.steps(index))
        block = source.read(ids, columns)
        require_counts(block.counts, where=f"cells {ids[0]:,} to {ids[-1]:,}")
        expressing = processor.count_known(block.counts, gene_ids) > 0
        if empty == "raise" and not expressing.all():
            raise ValueError(
                f"{(~expressing).sum():,} of the cells {ids[0]:,} to {ids[-1]:,} express no gene that the model knows, "
                f"first ids: {ids[~expressing][:5].tolist()}; leave them out, or pass empty='nan' to get rows of NaN"
            )
        tokens = processor.tokenize(block.counts, gene_ids, seed=0, epoch=0)
        named = {key: _class_ids(block.obs[column], ids_of)[expressing] for key, (column, ids_of) in domains.items()}
        named["positions"] = first + np.flatnonzero(expressing)
        for start in range(0, len(tokens), batch_size):
            cells = slice(start, start + batch_size)
            batch = (
                pad(tokens[cells], pad_id=processor.pad_id, pad_value=processor.pad_value)
                if config.counts_padding
                else pack(tokens[cells])
            )
            yield batch | {key: torch.from_numpy(of_cell[cells]) for key, of_cell in named.items()}
        first += len(ids)


def _class_ids(values: pd.Series, ids_of: dict[str, int]) -> Int64Array:
    """Return the id of each value.

    Raises:
        ValueError: a value has none.
    """
    ids = values.astype(str).map(ids_of)
    if ids.isna().any():
        unknown = sorted(set(values.astype(str)) - ids_of.keys())
        raise ValueError(
            f"obs[{values.name!r}] has {unknown[:5]}, experimental batches that the model was not trained on; it knows "
            f"{list(ids_of)[:10]}: leave these cells out, or fine-tune the model on them too"
        )
    return np.asarray(ids, dtype=np.int64)
