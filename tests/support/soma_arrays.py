"""Small sparse arrays and experiments of TileDB-SOMA, written entry by entry for the tests of the Census reader."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma as soma
import tiledbsoma.pytiledbsoma as core
from scipy.sparse import csr_matrix

from scgpt_hf.cells.soma.chunks import read_chunk
from scgpt_hf.cells.soma.layout import TILE, x_storage
from scgpt_hf.cells.soma.native import open_native

try:
    from tiledbsoma.options._util import build_clib_platform_config
except ModuleNotFoundError:  # where tiledbsoma 1.17 and 2.0 have it
    from tiledbsoma._util import build_clib_platform_config

DIMS = ("soma_dim_0", "soma_dim_1")
N_CELLS, N_GENES = 5000, 3000  # shape of the arrays: cells of three chunks, genes of two tiles


def create_array(
    folder: Path, *, dtype: str = "float", shape: tuple[int, int] = (N_CELLS, N_GENES), **storage: Any
) -> str:
    """Create an empty array with the storage options of X in a Census, some of them replaced; return its URI."""
    config = x_storage()
    config["tiledb"]["create"].update(storage)
    arrow_type = pa.type_for_alias(dtype)
    soma.SparseNDArray.create(str(folder), type=arrow_type, shape=shape, platform_config=config).close()
    return str(folder)


def create_odd_array(folder: Path, attributes: list[pa.Field], *, dims: tuple[str, str] = DIMS) -> str:
    """Write a `SparseNDArray` as only other programs write them, with two entries, and return its URI.

    Args:
        folder: must not exist.
        attributes: the attributes; `soma_data` of the second entry is null if it may be.
        dims: the dimensions in their order.
    """
    columns = [pa.field(name, pa.int64(), nullable=False) for name in dims]
    ends = {name: [0, 2**40, TILE, 0, size - 1] for name, size in zip(DIMS, (N_CELLS, N_GENES), strict=True)}
    index = pa.RecordBatch.from_pydict({name: ends[name] for name in dims}, schema=pa.schema(columns))
    context, schema = soma.SOMATileDBContext().native_context, pa.schema([*columns, *attributes])
    config = build_clib_platform_config(x_storage())  # type: ignore[arg-type]
    core.SOMADataFrame.create(
        str(folder), schema=schema, index_column_info=index, ctx=context, platform_config=config, timestamp=(0, 1)
    )
    table = {"soma_dim_0": [3, 4], "soma_dim_1": [5, 6]}
    table |= {field.name: [1.0, None if field.nullable else 2.0] for field in attributes}
    with soma.DataFrame.open(str(folder), "w") as frame:
        frame.write(pa.table(table, schema=schema))
    handle = core.SOMADataFrame.open(str(folder), mode=core.OpenMode.soma_write, context=context)
    handle.set_metadata("soma_object_type", np.array([b"SOMASparseNDArray"]), True)
    handle.close()
    return str(folder)


def write_entries(uri: str, cells: Any, genes: Any, counts: Any, time: Any = None) -> None:
    """Add a fragment with these entries to an array."""
    with soma.SparseNDArray.open(uri, "w", tiledb_timestamp=time) as array:
        columns = {"soma_dim_0": cells, "soma_dim_1": genes, "soma_data": counts}
        array.write(pa.table({name: pa.array(column) for name, column in columns.items()}))


def write_random_entries(
    uri: str,
    rng: np.random.Generator,
    first: int = 0,
    stop: int = N_CELLS,
    n_entries: int = 40_000,
    dtype: type = np.float32,
) -> None:
    """Add a fragment with random counts of random cells in [first, stop); an entry may occur twice."""
    counts = np.minimum(rng.geometric(0.6, n_entries), 200).astype(dtype)
    write_entries(uri, rng.integers(first, stop, n_entries), rng.integers(0, N_GENES, n_entries), counts)


def assert_native_equals_tiledb(array: soma.SparseNDArray, cell_ids: np.ndarray | None = None) -> None:
    """Assert that the native reader accepts an array, and reads all its chunks, or these cells of one, bit for bit."""
    native = open_native(array)
    assert native is not None, "the array is not read natively"
    chunks = [np.arange(first, min(first + TILE, array.shape[0])) for first in range(0, array.shape[0], TILE)]
    for ids in chunks if cell_ids is None else [cell_ids]:
        for ours, theirs in zip(read_chunk(native, ids), read_chunk(array, ids), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def write_experiment(folder: Path, counts: csr_matrix, **layers: csr_matrix) -> str:
    """Write an experiment with nothing but joinids in obs and var, and return its URI.

    Each layer of X is written in two fragments, cells from 3,000 on before the others, so that they are out of order.

    Args:
        folder: must not exist.
        counts: layer "raw". Shape (cells, genes).
        **layers: further layers. Shape (cells, genes) each.
    """
    with soma.Experiment.create(str(folder)) as experiment:
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", kind=soma.Measurement)
        for parent, name, size in ((experiment, "obs", counts.shape[0]), (rna, "var", counts.shape[1])):
            joinids = np.arange(size)
            columns = {"soma_joinid": joinids, "feature_id": joinids.astype(str), "feature_name": joinids.astype(str)}
            table = pa.table(columns)
            parent.add_new_dataframe(name, schema=table.schema, domain=[[0, size - 1]]).write(table)
        x = rna.add_new_collection("X")
        for name, matrix in {"raw": counts, **layers}.items():
            layer = x.add_new_sparse_ndarray(name, type=pa.float32(), shape=matrix.shape)
            for first, stop in ((3000, None), (0, 3000)):
                part = matrix[first:stop].tocoo()
                if part.nnz:
                    cells, genes = part.row.astype(np.int64) + first, part.col.astype(np.int64)
                    columns = {"soma_dim_0": cells, "soma_dim_1": genes, "soma_data": part.data.astype(np.float32)}
                    layer.write(pa.table(columns))
    return str(folder)
