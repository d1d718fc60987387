"""What `--cache_dir` changes in a run: where cells are read, and how they are shuffled once they lie in the cache.

Order follows from the settings alone: the first epoch is shuffled by chunks and the later ones over all cells, whether
or not a cache was there when the run began.
"""

import numpy as np
from accelerate import PartialState

from scgpt_hf.cells.cache.write_through import CachingSource
from scgpt_hf.cells.schedule.epoch import CHUNK_SIZE
from scgpt_hf.cells.source import CellSource
from scgpt_hf.training.recipe import Selection
from scgpt_hf.training.settings import DataSettings, Settings


def open_caching(source: CellSource, selection: Selection, settings: Settings) -> CachingSource:
    """Return the source that writes the run's cells to `cache_dir` on the way; nothing is written yet.

    Raises:
        ValueError: the data are a cache already, or the folder holds one that lacks what the run needs.
    """
    args, data = settings.training, settings.data
    return CachingSource(
        source,
        str(data.cache_dir),
        np.sort(np.concatenate(list(selection.parts.values()))),
        columns=[] if data.batch_key is None else [data.batch_key],
        job=(args.process_index, args.world_size),
        wait=PartialState().wait_for_everyone,
    )


def chunk_order(chunk_size: int, data: DataSettings) -> dict[str, int]:
    """Return the arguments of `plan_epoch` for a source's chunks: blocks hold as many cells for any source."""
    return {"chunk_size": chunk_size, "chunks_per_window": data.chunks_per_window * CHUNK_SIZE // chunk_size}
