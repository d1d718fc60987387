"""Read the output of 10x Cell Ranger and of STARsolo with scanpy: `.h5` files, and folders with `matrix.mtx`."""

import gzip
import logging
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from anndata import AnnData

from scgpt_hf.cells.files.formats import MATRIX, matrix_files
from scgpt_hf.cells.files.validation import translate_read_errors

logger = logging.getLogger(__name__)

_EXPRESSION = "Gene Expression"  # the type of genes among the features of 10x


def read_10x_hdf5(path: Path, name: str) -> AnnData:
    """Read the genes of an `.h5` file of 10x.

    Args:
        path: the file, decompressed.
        name: its name in errors.

    Raises:
        ValueError: the file cannot be read.
    """
    import scanpy

    with translate_read_errors(name, "an .h5 file of 10x"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")  # the ids of the genes are
        return _only_expression(scanpy.read_10x_h5(path, gex_only=False), name)


def read_10x_folder(path: Path) -> AnnData:
    """Read the genes of a 10x folder of Cell Ranger (2 or later) or STARsolo.

    Args:
        path: a folder with one `matrix.mtx`, or the path of a `matrix.mtx`. Files may be compressed (`.gz`), and their
            names may have a common prefix, as in GEO.

    Raises:
        ValueError: a file is missing or cannot be read, or the folder has several matrices.
    """
    import scanpy

    folder, found = (path, matrix_files(path)) if path.is_dir() else (path.parent, [path.name])
    prefixes = sorted({name[: name.lower().index(MATRIX)] for name in found})
    if len(prefixes) > 1:
        raise ValueError(
            f"{str(path)!r} holds {len(prefixes)} matrices; pass the path of one, or of several, e.g. "
            f"{str(folder / found[0])!r}"
        )
    with TemporaryDirectory(prefix="scgpt_hf-") as scratch, translate_read_errors(str(path), "a 10x folder"):
        _stage_10x(folder, prefixes[0], Path(scratch))
        adata = scanpy.read_10x_mtx(scratch, var_names="gene_ids", gex_only=False)
    return _only_expression(adata, str(path))


def _stage_10x(folder: Path, prefix: str, scratch: Path) -> None:
    """Provide the files as scanpy expects them: compressed with `features.tsv`, plain with `genes.tsv`."""
    files = {path.name.lower(): path for path in folder.iterdir()}
    legacy = not any(f"{prefix}features.tsv{suffix}".lower() in files for suffix in ("", ".gz"))
    for name in (MATRIX, "genes.tsv" if legacy else "features.tsv", "barcodes.tsv"):
        plain, compressed = (files.get(f"{prefix}{name}{suffix}".lower()) for suffix in ("", ".gz"))
        if plain is None and compressed is None:
            raise ValueError(
                f"{str(folder)!r} has no {prefix}{name} nor {prefix}{name}.gz beside {prefix}{MATRIX}; expected the "
                "three files matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv)"
            )
        as_is = plain if legacy else compressed
        target = scratch / (name if legacy else f"{name}.gz")
        if as_is is not None:
            target.symlink_to(as_is.absolute())
        elif legacy and compressed is not None:
            with gzip.open(compressed) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
        elif plain is not None:
            with plain.open("rb") as source, gzip.open(target, "wb", compresslevel=1) as copy:
                shutil.copyfileobj(source, copy, 2**20)


def _only_expression(adata: AnnData, name: str) -> AnnData:
    """Return the genes of a 10x matrix, without antibodies and other features, which are counted in the log."""
    if "feature_types" not in adata.var:
        return adata
    genes = (adata.var["feature_types"] == _EXPRESSION).to_numpy()
    if genes.all():
        return adata
    others = adata.var["feature_types"][~genes].value_counts().to_dict()
    logger.warning("%s: kept %d features of type %r, left out %s", name, genes.sum(), _EXPRESSION, others)
    return adata[:, genes].copy()
