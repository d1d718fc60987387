"""Write an AnnData in the formats that other programs write: old AnnData, big-endian numbers, Cell Ranger, STARsolo."""

import gzip
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.io import mmwrite
from scipy.sparse import csr_matrix


def write_old_h5ad(cells: AnnData, path: Path) -> None:
    """Write what anndata 0.6 wrote: tables as compound arrays, categories in uns, `raw.X` beside X."""
    raw = cells.raw.to_adata() if cells.raw is not None else None
    with h5py.File(path, "w") as file:
        _write_old_table(file, "obs", cells.obs)
        _write_old_table(file, "var", cells.var)
        _write_old_sparse(file, "X", csr_matrix(cells.X))
        file.create_group("uns")
        for name in cells.obs.select_dtypes("category"):
            file[f"uns/{name}_categories"] = cells.obs[name].cat.categories.to_numpy().astype("S")
        if raw is not None:
            _write_old_sparse(file, "raw.X", csr_matrix(raw.X))
            _write_old_table(file, "raw.var", raw.var)


def _write_old_table(file: h5py.File, name: str, table: pd.DataFrame) -> None:
    columns = {"index": table.index.to_numpy().astype("S")}
    for key, column in table.items():
        values = column.cat.codes if isinstance(column.dtype, pd.CategoricalDtype) else column
        columns[str(key)] = values.to_numpy() if values.dtype.kind in "biuf" else values.to_numpy().astype("S")
    types = [(key, values.dtype) for key, values in columns.items()]
    rows = np.zeros(len(table), types)
    for key, values in columns.items():
        rows[key] = values
    file.create_dataset(name, data=rows)


def _write_old_sparse(file: h5py.File, name: str, matrix: csr_matrix) -> None:
    group = file.create_group(name)
    group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", matrix.shape
    for key in ("data", "indices", "indptr"):
        group[key] = getattr(matrix, key)


def store_numbers_as(path: Path, change: str) -> None:
    """Store all arrays of numbers of an .h5ad file in another type.

    Args:
        path: the file.
        change: "big-endian" or "float16".
    """
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            dtype, attributes = file[name].dtype, dict(file[name].attrs)
            if dtype.kind not in "iuf" or file[name].shape == () or (change == "float16" and dtype.kind != "f"):
                continue
            values = file[name][()].astype(np.float16 if change == "float16" else dtype.newbyteorder(">"))
            del file[name]
            file[name] = values
            file[name].attrs.update(attributes)


def write_10x_folder(
    cells: AnnData, folder: Path, *, version: int = 3, compressed: bool = True, prefix: str = ""
) -> None:
    """Write the matrix folder of Cell Ranger 2 or 3; STARsolo writes that of version 3, not compressed."""
    folder.mkdir(parents=True)
    features = pd.DataFrame({"id": cells.var_names, "name": cells.var["feature_name"].to_numpy()})
    if version == 3:
        features["type"] = cells.var.get(
            "feature_types", pd.Series("Gene Expression", index=cells.var_names)
        ).to_numpy()
    names = {
        "features.tsv" if version == 3 else "genes.tsv": features.to_csv(sep="\t", header=False, index=False),
        "barcodes.tsv": "\n".join(cells.obs_names) + "\n",
    }
    for name, text in names.items():
        (folder / f"{prefix}{name}").write_text(text)
    mmwrite(folder / f"{prefix}matrix.mtx", csr_matrix(cells.X).T.astype(np.int64))
    if compressed:
        for path in list(folder.iterdir()):
            compress(path)


def compress(path: Path) -> Path:
    """Replace a file by its gzip-compressed copy, and return the path of the copy."""
    copy = path.with_name(f"{path.name}.gz")
    copy.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return copy


def write_10x_hdf5(cells: AnnData, path: Path, *, version: int = 3) -> None:
    """Write the .h5 file of Cell Ranger 2 or 3."""
    counts = csr_matrix(cells.X).astype(np.int32)  # by cell, as 10x, which transposes the matrix
    ids, names = cells.var_names.to_numpy().astype("S"), cells.var["feature_name"].to_numpy().astype("S")
    types = cells.var.get("feature_types", pd.Series("Gene Expression", index=cells.var_names)).to_numpy()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(counts, key)
        group["shape"], group["barcodes"] = counts.shape[::-1], cells.obs_names.to_numpy().astype("S")
        if version == 2:
            group["genes"], group["gene_names"] = ids, names
        else:
            features = {"id": ids, "name": names, "feature_type": types.astype("S")}
            features["genome"] = np.full(len(ids), b"GRCh38")
            for key, values in features.items():
                group[f"features/{key}"] = values
