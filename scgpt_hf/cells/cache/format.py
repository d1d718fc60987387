"""How cells lie in a shard of a cache: an Arrow IPC stream that `datasets` opens and that is read without copies.

One record batch holds the cells of one aligned chunk of ids, ascending; so the bytes of a shard depend on its cells
alone. `gene` is the row of the cache's genes, `count` its raw count in one byte: 255 means that the cell's next entry
of `large_count` holds it. Which cells make a shard is decided in `cache_jobs.py`; reading is in `cache_shards.py`.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias
from uuid import uuid4

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from scgpt_hf.cells.block import CellBlock, Int64Array
from scgpt_hf.cells.soma.layout import TILE

ESCAPE = 255  # in `count`: the count is the next entry of `large_count`
LARGEST = 2**32 - 1  # largest count that a cache holds
CELL_COLUMNS = ("cell_id", "gene", "count", "large_count")  # the first columns; those of obs follow

Array: TypeAlias = NDArray[Any]


class Written(NamedTuple):
    """What a written file is: the sha256 of its bytes, in hexadecimal, and their number."""

    sha256: str
    n_bytes: int


def cache_schema(n_genes: int, obs_types: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return the columns of a shard; genes are numbered in 16 bits where they fit.

    Raises:
        ValueError: a column of obs is called like one of the cells' own.
    """
    if taken := sorted(set(obs_types) & set(CELL_COLUMNS)):
        raise ValueError(f"the obs columns {taken} are called like columns of a cache; rename them or leave them out")
    gene = pa.uint16() if n_genes <= 2**16 else pa.uint32()
    lists = {"gene": gene, "count": pa.uint8(), "large_count": pa.uint32()}
    fields = [("cell_id", pa.int64()), *((name, pa.list_(item)) for name, item in lists.items()), *obs_types.items()]
    return pa.schema(fields)


def obs_type(column: pd.Series) -> pa.DataType:
    """Return how a column of obs is stored: booleans and numbers as they are, all else as text."""
    dtype: Any = column.cat.categories.dtype if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype
    if dtype.kind not in "biuf":
        return pa.string()
    return pa.from_numpy_dtype(getattr(dtype, "numpy_dtype", dtype))


def encode_chunks(block: CellBlock, schema: pa.Schema, rows: Int64Array | None = None) -> Iterator[pa.RecordBatch]:
    """Yield cells of a block by ascending id, one record batch for each aligned chunk of ids.

    Args:
        block: of cells.
        schema: as `cache_schema` returns it.
        rows: which of them; all when not given. Shape (cells,).

    Raises:
        ValueError: see `encode_cells`.
    """
    rows = np.arange(len(block)) if rows is None else rows
    rows = rows[np.argsort(block.cell_ids[rows])]
    edges = np.flatnonzero(np.diff(block.cell_ids[rows] // TILE)) + 1
    for chunk in np.split(rows, edges) if len(rows) else []:
        yield encode_cells(block.take(chunk), schema)


def encode_cells(cells: CellBlock, schema: pa.Schema) -> pa.RecordBatch:
    """Return cells as a record batch.

    Args:
        cells: raw counts, ids and obs columns of the cells.
        schema: as `cache_schema` returns it.

    Raises:
        ValueError: a count is larger than 4,294,967,295.
    """
    counts, genes, indptr = cells.data, cells.indices, cells.indptr
    if (largest := counts.max(initial=0)) > LARGEST:
        raise ValueError(f"found a count of {largest:,.0f}; a cache holds counts up to {LARGEST:,}")
    offsets, is_large = indptr.astype(np.int32), np.flatnonzero(counts >= ESCAPE)
    small = counts if counts.dtype == np.uint16 else np.minimum(counts, ESCAPE)
    small = small.astype(np.uint8)  # of two bytes the lower one
    small[is_large] = ESCAPE
    genes = genes.astype(schema.field("gene").type.value_type.to_pandas_dtype(), copy=False)
    columns = [
        pa.array(cells.cell_ids),
        pa.ListArray.from_arrays(offsets, genes),
        pa.ListArray.from_arrays(offsets, small),
        pa.ListArray.from_arrays(np.searchsorted(is_large, offsets), counts[is_large].astype(np.uint32)),
        *(_encode_column(cells.obs[field.name], field.type) for field in list(schema)[len(CELL_COLUMNS) :]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def write_shard(
    path: Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    *,
    scratch: Path,
    check: Callable[[Written], object] = lambda written: None,
) -> Written:
    """Write record batches to a file, which appears when it is whole; return its hash and size.

    Args:
        path: of the file.
        schema: of the batches.
        batches: what to write.
        scratch: folder on the same disk in which the file grows; made if it does not exist.
        check: is shown the hash and size; what it raises leaves `path` as it is.

    Raises:
        OSError: writing failed; the message says where, and how full the disk is.
    """
    beside = scratch / f"{path.name}.{uuid4().hex[:8]}"
    scratch.mkdir(exist_ok=True)
    try:
        with beside.open("xb") as file:
            hashed = _HashedFile(file)
            with pa.ipc.new_stream(hashed, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        check(Written(hashed.sha256.hexdigest(), hashed.n_bytes))
        os.replace(beside, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(path.parent).free / 1e9
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {path} could not be written, {free:.2f} GB are free. Make room, or choose another "
            "folder; run the same again and only what is missing is written",
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return Written(hashed.sha256.hexdigest(), hashed.n_bytes)


class _HashedFile:
    """A file to write to that knows the hash of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.n_bytes, self.closed = file, hashlib.sha256(), 0, False

    def write(self, content: bytes) -> int:
        """Hash and write."""
        self.sha256.update(content)
        self.n_bytes += len(content)
        return self.file.write(content)

    def flush(self) -> None:
        """Do nothing: the file is flushed once, at its end."""


def _encode_column(column: pd.Series, kind: pa.DataType) -> pa.Array:
    """Return a column of obs with nulls where a value is missing."""
    if kind == pa.string():
        codes, values = pd.factorize(column)  # few labels for many cells
        return pa.array([str(value) for value in values], pa.string()).take(pa.array(codes, mask=codes < 0))
    missing = column.isna().to_numpy()
    return pa.array(column.astype(object).to_numpy() if missing.any() else column.to_numpy(), kind, from_pandas=True)
