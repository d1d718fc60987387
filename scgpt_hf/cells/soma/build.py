"""Build a local SOMA in the layout of the CELLxGENE Census from files, such as .h5ad.

The package `files` opens the files, joins their genes and checks their counts; `layout.py` has the storage options.
`census.py` reads the result, and so does every other program that reads a Census.

X has to be written in the order in which TileDB stores it: tile after tile. `_order_by_tile` sorts each block of cells
that way, because TileDB would take five times as long.
"""

import errno
import glob
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scgpt_hf.cells.compiled import compiled
from scgpt_hf.cells.files.formats import name_files
from scgpt_hf.cells.files.reader import AnnDataPart, AnnDataSource
from scgpt_hf.cells.genes import join_genes
from scgpt_hf.cells.locking import exclusive, rename_new
from scgpt_hf.cells.missing import UNKNOWN, fill_missing, has_value, number_texts
from scgpt_hf.cells.obs import require_columns
from scgpt_hf.cells.soma.context import TILEDB_CONFIG
from scgpt_hf.cells.soma.layout import OBS_LABELS, OBS_NUMBERS, PRESENCE, TILE, table_storage, x_storage
from scgpt_hf.output import require_writable_folder
from scgpt_hf.progress_bar import progress_bar

logger = logging.getLogger(__name__)

# Cells of one write. A multiple of a chunk, so that the cells of a chunk are in one fragment.
CELLS_PER_WRITE = 4 * TILE
_ROWS_PER_WRITE = 1 << 22  # of a table, so that a write of obs takes a few hundred megabytes whatever its size
# `_order_by_tile` guarantees the order; a check by TileDB would take a fifth of the time of writing.
_WRITING: dict[str, str | float] = {"sm.check_global_order": "false", **TILEDB_CONFIG}


def build_census(
    paths: Sequence[str | Path],
    folder: str | Path,
    *,
    organism: str = "homo_sapiens",
    layer: str | None = None,
    round_counts: bool = False,
    donor_key: str = "donor_id",
    keep_obs: Sequence[str] = (),
) -> Path:
    """Build a SOMA in the Census layout with the cells of all files and the union of their genes.

    Each file becomes one dataset. Its name is the `dataset_id` in obs if there is exactly one, else the name of the
    file, or of its folder where files in several folders have the same name. Columns of the Census that the files lack
    are filled with "unknown", and `is_primary_data` with True; so are missing values in these columns. Columns that the
    Census does not have are dropped, unless you keep them; there, missing values stay missing (null). All of this is
    logged. The folder is created at the end: a failed build leaves nothing behind.

    Args:
        paths: files with raw counts and an obs column with donors; `cells/files/formats.py` lists the formats.
        folder: the folder to create.
        organism: name of the experiment.
        layer: layer of the files with the raw counts; by default it is found, see `choose_layer`.
        round_counts: round fractional counts.
        donor_key: obs column with the donors, which becomes `donor_id`; "dataset_id" if each file is one donor.
        keep_obs: obs columns to keep in addition to those of the Census.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists, or another process is building it.
        OSError: writing failed, most often because the disk is full.
        ValueError: a file has no raw counts or lacks donors; or two files have the same name.

    Example:
        >>> build_census(["first.h5ad", "second.h5ad"], "my_census")  # doctest: +SKIP
        PosixPath('my_census')
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{str(folder)!r} exists; choose another folder")
    require_writable_folder(folder)
    source = AnnDataSource(list(paths), layer=layer, primary_only=False, round_counts=round_counts)
    _require_donors(source.parts, donor_key)
    dataset_ids = _name_datasets(source.parts)
    labels = _label_cells(source, dataset_ids, donor_key, keep_obs)
    _compare_space(source.parts, folder)
    with exclusive(folder):
        if folder.exists():  # another process has built it since the first look
            raise FileExistsError(f"{str(folder)!r} exists; choose another folder or remove it")
        # No other process is building this folder, so these are of builds that were killed.
        if left := [str(path) for path in sorted(folder.parent.glob(f".{glob.escape(folder.name)}-*"))]:
            logger.warning("an earlier build of %s was killed and left %s; you can remove them", folder, left)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            root = Path(scratch) / "soma"
            try:
                write_soma(str(root), organism, source, labels, dataset_ids)
            except soma.SOMAError as error:
                raise _write_error(error, folder) from error
            rename_new(root, folder)
    logger.info("built %s: %d cells, %d genes, %d datasets", folder, len(labels), len(source.genes), len(dataset_ids))
    return folder


def _compare_space(parts: Sequence[AnnDataPart], folder: Path) -> None:
    """Warn if the disk has less free space than the files take; the Census may still fit, as it is compressed."""
    size = sum(file.stat().st_size for part in parts for file in (Path(part.name), *Path(part.name).rglob("*")))
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    if free < size:
        logger.warning(
            "the files take %.1f GB, but only %.1f GB are free for %s, which may not fit: it takes about 0.6 times the "
            "size of compressed files, less of others",
            *(size / 1e9, free / 1e9, folder),
        )


def _write_error(error: soma.SOMAError, folder: Path) -> OSError:
    """Return the OSError for an error of TileDB while writing."""
    code = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else errno.EIO
    free = shutil.disk_usage(folder.parent).free / 1e9
    return OSError(
        code,
        f"writing {folder} failed, with {free:.2f} GB free on the disk; make room or choose another folder. Nothing is "
        f"left behind. TileDB reports: {error}",
    )


def _require_donors(parts: Sequence[AnnDataPart], donor_key: str) -> None:
    """Raise unless all cells have a donor."""
    if donor_key == "dataset_id":
        return
    lacking = [part.name for part in parts if donor_key not in part.obs]
    for part in parts:
        if part.name in lacking:
            others = f"; nor have {lacking[1:6]}" if lacking[1:] else ""
            raise ValueError(
                f"{part.name}: obs has no column {donor_key!r}, by which cells are split{others}; name the column with "
                "the donors (--donor_key COLUMN, or dataset_id if each file is one donor); its columns are "
                f"{sorted(map(str, part.obs))}"
            )
        if n_missing := int((~has_value(part.obs[donor_key])).sum()):
            raise ValueError(
                f"{part.name}: {n_missing:,} of {len(part.obs):,} cells have no {donor_key}, by which cells are split; "
                "remove these cells, or name another column with the donors (--donor_key COLUMN)"
            )


def _name_datasets(parts: Sequence[AnnDataPart]) -> list[str]:
    """Return the dataset id of each file after checking that all ids differ."""
    names, from_obs = name_files([part.name for part in parts]), []
    for index, part in enumerate(parts):
        ids = part.obs["dataset_id"] if "dataset_id" in part.obs else pd.Series(dtype=object)
        given = list(ids[has_value(ids)].unique())
        from_obs.append(len(given) == 1)
        if from_obs[-1]:
            names[index] = str(given[0])
    _require_different(names, from_obs, [part.name for part in parts])
    return names


def _require_different(names: Sequence[str], from_obs: Sequence[bool], paths: Sequence[str]) -> None:
    """Raise if two files have the same dataset id.

    Args:
        names: the dataset id of each file.
        from_obs: whether it is from the column `dataset_id` of obs, or else from the name of the file.
        paths: the files.
    """
    if not (repeated := next((name for name in names if names.count(name) > 1), None)):
        return
    which = [index for index, name in enumerate(names) if name == repeated]
    remedy = (
        "set obs['dataset_id'] to another value in all but one of them"
        if any(from_obs[index] for index in which)
        else "rename all but one of them"
    )
    raise ValueError(
        f"found {len(which)} files of one dataset {repeated!r}: {[paths[index] for index in which]}; if they hold the "
        f"same cells, pass only one; if not, {remedy}"
    )


def _label_cells(
    source: AnnDataSource, dataset_ids: Sequence[str], donor_key: str, keep_obs: Sequence[str]
) -> pd.DataFrame:
    """Return the obs columns taken from the files, with "unknown" where they lack a column of the Census."""
    found = source.obs(source.obs_columns)
    require_columns(keep_obs, source.obs_columns)
    absent = [name for name in (*OBS_LABELS, "is_primary_data") if name not in found and name != "dataset_id"]
    dropped = sorted(set(source.obs_columns) - {*OBS_LABELS, *OBS_NUMBERS, "is_primary_data", donor_key, *keep_obs})
    if absent:
        shown = [name for name in absent if not name.endswith("_ontology_term_id")]
        n_hidden = len(absent) - len(shown)
        logger.info("no file has the obs columns %s and %d of ontology ids: they are 'unknown'", shown, n_hidden)
    if dropped:
        logger.info("obs columns that a Census does not have are left out: %s; --keep_obs keeps them", dropped)
    sizes = [len(part.obs) for part in source.parts]
    labels = pd.DataFrame({"dataset_id": np.repeat(np.array(dataset_ids, dtype=object), sizes)})
    found["donor_id"] = labels["dataset_id"].array if donor_key == "dataset_id" else found[donor_key]
    for name in OBS_LABELS[1:]:
        labels[name] = fill_missing(found[name]).to_numpy(object) if name in found else UNKNOWN
    labels["is_primary_data"] = found["is_primary_data"].to_numpy() if "is_primary_data" in found else True
    for name in keep_obs:
        if name not in labels:
            labels[name] = found[name].array
    missing = {name: int((~has_value(found[name])).sum()) for name in OBS_LABELS if name in found}
    if filled := {name: n for name, n in missing.items() if n}:
        logger.info("cells without a value: %s", filled)
    return labels


def write_soma(
    uri: str,
    organism: str,
    source: AnnDataSource,
    labels: pd.DataFrame,
    dataset_ids: Sequence[str],
    *,
    write_counts: Callable[[soma.SparseNDArray, Any], tuple[pd.DataFrame, NDArray[np.int64]]] | None = None,
) -> None:
    """Write a SOMA in the Census layout; the source is read a few thousand cells at a time.

    Args:
        uri: the address to write to; must not exist.
        organism: name of the experiment.
        source: anything with `genes`, `read` and `parts` (`name`, `obs`, `genes`) as `AnnDataSource` has them.
        labels: obs without the columns that are computed here from the counts. Shape (cells, columns).
        dataset_ids: one id for each part.
        write_counts: writes the counts of the source; returns what `_write_counts`, which is the default, returns.
    """
    genes, places = join_genes([part.genes for part in source.parts])
    shape = (len(labels), len(genes))
    root: Any = soma.Collection.create(uri, context=soma.SOMATileDBContext(tiledb_config=_WRITING))
    with root:
        info = root.add_new_collection("census_info")
        data = root.add_new_collection("census_data")
        experiment = data.add_new_collection(organism, kind=soma.Experiment)
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", kind=soma.Measurement)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=shape, platform_config=x_storage()
        )
        numbers, gene_nnz = (write_counts or _write_counts)(raw, source)
        sizes = [len(part.obs) for part in source.parts]
        numbers["n_measured_vars"] = np.repeat([len(np.unique(place)) for place in places], sizes)
        measured = np.zeros(len(genes), dtype=np.int64)
        for place, size in zip(places, sizes, strict=True):
            measured[place] += size
        obs = labels.copy(deep=False)  # not `concat`, which copies all columns of what may be 100 million cells
        obs[numbers.columns] = numbers
        _write_table(experiment, "obs", obs, OBS_LABELS)
        _write_table(rna, "var", genes.assign(nnz=gene_nnz, n_measured_obs=measured))
        _write_presence(rna, places, len(genes))
        _write_table(info, "datasets", _datasets_table(source.parts, dataset_ids))
        _write_table(info, "summary", _summary_table(labels, organism))


def _write_presence(rna: Any, places: Sequence[NDArray[np.int32]], n_genes: int) -> None:
    """Write which genes each data set measured: those of its file. Rows are in the order of the table of data sets."""
    measured = [np.unique(place).astype(np.int64) for place in places]
    rows = np.repeat(np.arange(len(places)), [len(genes) for genes in measured])
    ones = np.ones(len(rows), np.uint8)
    entries = {"soma_dim_0": rows, "soma_dim_1": np.concatenate(measured), "soma_data": ones}
    presence = rna.add_new_sparse_ndarray(PRESENCE, type=pa.uint8(), shape=(len(places), n_genes))
    presence.write(pa.table(entries))
    presence.close()


def _write_counts(raw: soma.SparseNDArray, source: AnnDataSource) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    """Write all counts; return the computed obs columns, and the number of cells that express each gene, for var."""
    n_cells, n_genes = raw.shape

    def prepare(start: int) -> tuple[pa.Table, pd.DataFrame, NDArray[np.int64]]:
        counts = source.read(np.arange(start, min(start + CELLS_PER_WRITE, n_cells))).counts
        return entries_by_tile(counts, start), _count_numbers(counts), np.bincount(counts.indices, minlength=n_genes)

    tables, gene_nnz = [], np.zeros(n_genes, dtype=np.int64)
    with (
        ThreadPoolExecutor(1) as pool,
        progress_bar(total=n_cells, unit="cells", description="building") as progress,
    ):
        ahead = pool.submit(prepare, 0)  # the next cells are read and sorted while TileDB writes these
        for start in range(0, n_cells, CELLS_PER_WRITE):
            entries, numbers, nnz = ahead.result()
            if start + CELLS_PER_WRITE < n_cells:
                ahead = pool.submit(prepare, start + CELLS_PER_WRITE)
            raw.write(entries, platform_config=soma.TileDBWriteOptions(sort_coords=False))
            tables.append(numbers)
            gene_nnz += nnz
            progress.update(len(numbers))
    return pd.concat(tables, ignore_index=True), gene_nnz


def entries_by_tile(counts: csr_matrix, first_cell: int) -> pa.Table:
    """Return the entries in the order in which TileDB stores them."""
    n_tiles = (-(-counts.shape[0] // TILE), -(-counts.shape[1] // TILE))
    entries = _order_by_tile(counts.indptr, counts.indices, counts.data, first_cell, n_tiles)
    return pa.table(dict(zip(("soma_dim_0", "soma_dim_1", "soma_data"), entries, strict=True)))


@compiled
def _order_by_tile(indptr, indices, data, first_cell, n_tiles):  # type: ignore[no-untyped-def]
    """Return cells, genes and counts tile by tile, and cell by cell within a tile.

    A counting sort: the first pass counts the entries of each tile, the second copies each entry to its place.
    `first_cell` is the id of the first cell, at the edge of a tile.
    """
    places = np.zeros(n_tiles[0] * n_tiles[1] + 1, np.int64)
    for cell in range(len(indptr) - 1):
        for entry in range(indptr[cell], indptr[cell + 1]):
            places[cell // TILE * n_tiles[1] + indices[entry] // TILE + 1] += 1
    places = np.cumsum(places)
    cells, genes = np.empty(len(data), np.int64), np.empty(len(data), np.int64)
    counts = np.empty(len(data), data.dtype)
    for cell in range(len(indptr) - 1):
        for entry in range(indptr[cell], indptr[cell + 1]):
            tile = cell // TILE * n_tiles[1] + indices[entry] // TILE
            place = places[tile]
            cells[place], genes[place], counts[place] = cell + first_cell, indices[entry], data[entry]
            places[tile] = place + 1
    return cells, genes, counts


def _count_numbers(counts: csr_matrix) -> pd.DataFrame:
    """Return the obs columns that a Census computes from the counts of a cell.

    `raw_sum` is over all genes; the number, mean and variance (n - 1) are over the expressed ones. Shape (cells, 4).
    """
    nnz = np.diff(counts.indptr).astype(np.int64)
    total, mean, variance = _moments(counts.indptr, counts.data)
    return pd.DataFrame({"raw_sum": total, "nnz": nnz, "raw_mean_nnz": mean, "raw_variance_nnz": variance})


@compiled
def _moments(indptr, data):  # type: ignore[no-untyped-def]
    """Return sum, mean and variance of the entries of each row, 0 for an empty row. float64, shape (rows,) each."""
    total, mean, variance = np.zeros(len(indptr) - 1), np.zeros(len(indptr) - 1), np.zeros(len(indptr) - 1)
    for row in range(len(indptr) - 1):
        entries = data[indptr[row] : indptr[row + 1]]
        for count in entries:
            total[row] += count
        mean[row] = total[row] / max(len(entries), 1)
        for count in entries:
            variance[row] += (count - mean[row]) ** 2
        variance[row] /= max(len(entries) - 1, 1)
    return total, mean, variance


def _write_table(parent: Any, name: str, table: pd.DataFrame, dictionaries: Sequence[str] = ()) -> None:
    """Write a table into a collection; its joinids are the row numbers.

    Args:
        parent: the collection.
        name: name of the table in the collection.
        table: the columns.
        dictionaries: text columns to store as dictionaries, like categoricals.
    """
    fields = [pa.field(column, _arrow_type(table[column], column in dictionaries)) for column in table]
    schema = pa.schema([*fields, pa.field("soma_joinid", pa.int64())])
    # Each part is written with the dictionaries of the complete table: if those of one part lack texts of another one,
    # the cells of that part cannot be read (tiledbsoma 2.3).
    texts = {field.name: _text_order(table[field.name]) for field in fields if pa.types.is_dictionary(field.type)}
    parent.add_new_dataframe(
        name, schema=schema, domain=[[0, len(table) - 1]], platform_config=table_storage(schema)
    ).close()
    # A table loses its dictionaries, so that filters match nothing, if it is written through the handle that created it
    # or within the same millisecond (TileDB 2.30). So wait, and open it again.
    sleep(0.002)
    with soma.DataFrame.open(f"{parent.uri}/{name}", "w", context=parent.context) as frame:
        for start in range(0, len(table), _ROWS_PER_WRITE):
            rows = table.iloc[start : start + _ROWS_PER_WRITE]
            arrays = [_to_arrow(rows[field.name], field.type, texts.get(field.name)) for field in fields]
            joinids = pa.array(np.arange(start, start + len(rows)))
            frame.write(pa.Table.from_arrays([*arrays, joinids], schema=schema))


def _is_number(column: pd.Series) -> bool:
    return column.dtype.kind in "biuf"


def _to_arrow(column: pd.Series, kind: pa.DataType, dictionary: Sequence[str] | None) -> pa.Array:
    """Return numbers as they are; text, categories or mixed values as text, null where a value is missing.

    Args:
        column: the column, or a part of it. Shape (cells,).
        kind: type to return; see `_arrow_type`.
        dictionary: all texts of the complete column, if they are stored as a dictionary.
    """
    if _is_number(column):
        return pa.array(column, kind, from_pandas=True)
    numbers, texts = number_texts(column)
    if dictionary is None:
        return pa.array(np.array([*texts, None], object)[numbers], kind)
    place = {text: number for number, text in enumerate(dictionary)}
    codes = np.array([*(place[text] for text in texts), -1], np.int32)[numbers]
    return pa.DictionaryArray.from_arrays(
        pa.array(codes, mask=codes < 0), pa.array(dictionary, pa.large_string()), ordered=kind.ordered
    )


def _text_order(column: pd.Series) -> list[str]:
    """Return the texts of a column: ordered categories in their order, which filters such as `grade > 'low'` follow.

    Only those that occur are kept: tiledbsoma drops the others from some tables.
    """
    texts = number_texts(column)[1]
    if not _has_order(column):
        return texts
    return [text for text in dict.fromkeys(fill_missing(pd.Series(column.cat.categories))) if text in set(texts)]


def _has_order(column: pd.Series) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype) and bool(column.dtype.ordered)


def _arrow_type(column: pd.Series, dictionary: bool) -> pa.DataType:
    if _is_number(column):
        return pa.from_numpy_dtype(getattr(column.dtype, "numpy_dtype", column.dtype))
    if _has_order(column):
        return pa.dictionary(pa.int32(), pa.large_string(), ordered=True)
    return pa.dictionary(pa.int32(), pa.large_string()) if dictionary else pa.large_string()


def _datasets_table(parts: Sequence[AnnDataPart], dataset_ids: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "dataset_id": dataset_ids,
            "dataset_title": dataset_ids,
            "dataset_h5ad_path": [Path(part.name).name for part in parts],
            "dataset_total_cell_count": [len(part.obs) for part in parts],
        }
    )


def _summary_table(labels: pd.DataFrame, organism: str) -> pd.DataFrame:
    summary = {
        "census_schema_version": "2.4.0",
        "census_build_date": datetime.now(UTC).date().isoformat(),
        "total_cell_count": len(labels),
        "unique_cell_count": int(labels["is_primary_data"].sum()),
        f"number_donors_{organism}": len(labels[["dataset_id", "donor_id"]].drop_duplicates()),
        "built_by": "scgpt_hf",
    }
    return pd.DataFrame({"label": list(summary), "value": [str(value) for value in summary.values()]})
