"""The file format of a shard: an Arrow IPC stream, which `datasets` opens and which is read without copies.

Each record batch holds the cells of one aligned chunk of 2,048 ids, in ascending order. So the bytes of a shard depend
only on its cells, not on how they were read. The columns are `cell_id`, `gene`, `count`, `large_count` and the columns
of obs. `gene` lists the genes of a cell as rows of `genes.csv`, and `count` their raw counts in one byte each. A count
of 255 or more is stored as 255, and its value is the cell's next entry of `large_count`.

`jobs.py` decides which cells make a shard; `shards.py` reads them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, Int64Array
from scgpt_hf.cells.jobs.hashed_file import HashedFile

ESCAPE = 255  # in `count`: the value is the next entry of `large_count`
MAX_COUNT = 2**32 - 1  # the largest value of `large_count`
CELL_COLUMNS = ("cell_id", "gene", "count", "large_count")  # the first columns; those of obs follow


def cache_schema(n_genes: int, obs_types: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return the Arrow schema of a shard; genes take 16 bits if they fit, else 32.

    Args:
        n_genes: number of genes of the cache.
        obs_types: the type of each obs column, from `obs_type`.

    Raises:
        ValueError: an obs column has the name of one of `CELL_COLUMNS`.
    """
    if taken := sorted(set(obs_types) & set(CELL_COLUMNS)):
        raise ValueError(f"a cache uses the names {taken} for other columns; rename these obs columns, or omit them")
    gene = pa.uint16() if n_genes <= 2**16 else pa.uint32()
    lists = {"gene": gene, "count": pa.uint8(), "large_count": pa.uint32()}
    fields = [("cell_id", pa.int64()), *((name, pa.list_(item)) for name, item in lists.items()), *obs_types.items()]
    return pa.schema(fields)


def obs_type(column: pd.Series) -> pa.DataType:
    """Return the Arrow type of an obs column: that of booleans and numbers, and text for everything else."""
    dtype: Any = column.cat.categories.dtype if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype
    if dtype.kind not in "biuf":
        return pa.string()
    return pa.from_numpy_dtype(getattr(dtype, "numpy_dtype", dtype))


def encode_chunks(block: CellBlock, schema: pa.Schema, rows: Int64Array | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the cells of a block as record batches, by ascending id, one for each aligned chunk of ids.

    Args:
        block: cells in any order.
        schema: the schema from `cache_schema`.
        rows: positions of the cells in the block; by default all. Shape (cells,).

    Raises:
        ValueError: see `encode_cells`.
    """
    rows = np.arange(len(block)) if rows is None else rows
    rows = rows[np.argsort(block.cell_ids[rows])]
    edges = np.flatnonzero(np.diff(block.cell_ids[rows] // CHUNK_SIZE)) + 1
    for chunk in np.split(rows, edges) if len(rows) else []:
        yield encode_cells(block.take(chunk), schema)


def encode_cells(cells: CellBlock, schema: pa.Schema) -> pa.RecordBatch:
    """Return cells as one record batch.

    Args:
        cells: the cells of one chunk, by ascending id.
        schema: the schema from `cache_schema`.

    Raises:
        ValueError: a count is larger than 4,294,967,295.
    """
    counts, genes, indptr = cells.data, cells.indices, cells.indptr
    if (largest := counts.max(initial=0)) > MAX_COUNT:
        raise ValueError(f"found a count of {largest:,.0f}, but a cache holds counts up to {MAX_COUNT:,}")
    offsets, large = indptr.astype(np.int32), np.flatnonzero(counts >= ESCAPE)
    small = counts if counts.dtype == np.uint16 else np.minimum(counts, ESCAPE)
    # Casting wraps counts above 255; the next line overwrites them with ESCAPE.
    small = small.astype(np.uint8)
    small[large] = ESCAPE
    genes = genes.astype(schema.field("gene").type.value_type.to_pandas_dtype(), copy=False)
    columns = [
        pa.array(cells.cell_ids),
        pa.ListArray.from_arrays(offsets, genes),
        pa.ListArray.from_arrays(offsets, small),
        pa.ListArray.from_arrays(np.searchsorted(large, offsets), counts[large].astype(np.uint32)),
        *(encode_column(cells.obs[field.name], field.type) for field in list(schema)[len(CELL_COLUMNS) :]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def write_batches(file: HashedFile, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches to an empty file.

    Args:
        file: the file, open for writing.
        schema: the schema of the batches.
        batches: the cells.
    """
    with pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def encode_column(column: pd.Series, arrow_type: pa.DataType) -> pa.Array:
    """Return an obs column as an Arrow array, with nulls where a value is missing.

    Args:
        column: the column. Shape (cells,).
        arrow_type: its type, from `obs_type`.
    """
    if arrow_type == pa.string():
        codes, values = pd.factorize(column)  # converts each label once, not once for each cell
        return pa.array([str(value) for value in values], pa.string()).take(pa.array(codes, mask=codes < 0))
    missing = column.isna().to_numpy()
    return pa.array(
        column.astype(object).to_numpy() if missing.any() else column.to_numpy(), arrow_type, from_pandas=True
    )
