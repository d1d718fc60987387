"""What `--cache_dir` changes in a run: where cells are read, and how they are shuffled once they lie in the cache.

Order follows from the settings alone: the first epoch is shuffled by bands and the later ones over all cells, whether
or not a cache was there when the run began.
"""

import numpy as np
from accelerate import PartialState

from scgpt_hf.cells.cache.write_through import CachingSource
from scgpt_hf.cells.schedule.epoch import BAND_SIZE
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
        columns=[] if data.domain_key is None else [data.domain_key],
        job=(args.process_index, args.world_size),
        wait=PartialState().wait_for_everyone,
    )


def band_order(band_size: int, data: DataSettings) -> dict[str, int]:
    """Return the arguments of `plan_epoch` for a source's bands: blocks hold as many cells for any source."""
    return {"band_size": band_size, "bands_per_block": data.bands_per_block * BAND_SIZE // band_size}
