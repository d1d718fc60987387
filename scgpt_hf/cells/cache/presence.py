"""The genes that the data sets of a cache measured, in `presence.safetensors`.

Cells of a data set have neighboring ids, so the file holds runs of cells instead of a number for each cell. Caches of
sources that do not know the measured genes have no such file; nor have caches of earlier versions.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from scgpt_hf.cells.atomic import replace_file
from scgpt_hf.cells.block import AnyArray, Int64Array
from scgpt_hf.cells.cache.manifest import JOBS, MANIFEST
from scgpt_hf.cells.jobs.records import REMEDY, ShardError, hash_file
from scgpt_hf.cells.presence import Presence

PRESENCE = "presence.safetensors"


def write_presence(folder: Path, cell_ids: Int64Array, presence: Presence) -> str:
    """Write the file and return its SHA-256.

    Args:
        folder: the folder of the cache.
        cell_ids: the cells of the cache, ascending. Shape (cells,).
        presence: the genes that the data set of each of these cells measured.
    """
    starts = np.flatnonzero(np.diff(presence.dataset_of_cell, prepend=-1))
    arrays: dict[str, AnyArray] = {
        "first_cells": cell_ids[starts].astype(np.int64),
        "datasets": presence.dataset_of_cell[starts].astype(np.int64),
        # Eight genes in a byte. safetensors stores the memory as it is, whatever the order of its axes.
        "measured": np.ascontiguousarray(np.packbits(presence.measured, axis=1)),
    }
    with replace_file(folder / PRESENCE, folder=folder / JOBS) as temporary:
        temporary.write_bytes(save(arrays))
    return hash_file(folder / PRESENCE)


def read_presence(folder: Path, cell_ids: Int64Array, n_genes: int) -> Presence | None:
    """Read which genes the data set of each cell measured; None if the manifest lists no such file.

    Args:
        folder: the folder of the cache.
        cell_ids: cells of the cache. Shape (cells,).
        n_genes: number of genes of the cache.

    Raises:
        ShardError: the file is missing, corrupt, or does not fit the genes.
    """
    expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("presence")
    if expected is None:
        return None
    path = folder / PRESENCE
    if not path.is_file():
        raise ShardError(f"{path} is missing; {REMEDY}")
    if (found := hash_file(path)) != expected:
        raise ShardError(f"{path} is corrupt: expected sha256 {str(expected)[:16]}…, found {found[:16]}…; {REMEDY}")
    try:
        arrays = load(path.read_bytes())
        if (width := arrays["measured"].shape[1]) != -(-n_genes // 8):
            raise ValueError(f"{width} bytes for each data set")
        measured = np.unpackbits(arrays["measured"], axis=1, count=n_genes).astype(np.bool_)
        run = np.searchsorted(arrays["first_cells"], cell_ids, side="right") - 1
        return Presence(arrays["datasets"][run], measured)
    except (SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
        raise ShardError(f"{path} does not hold the measured genes of {n_genes:,} genes ({error}); {REMEDY}") from error
