"""The cells of an .h5ad file annotated without reading its counts into memory: a copy of it, with new columns in obs.

Which type a cell is, is decided in `annotate.py`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
from anndata import AnnData
from anndata.io import write_elem
from transformers import PreTrainedModel

from scgpt_hf.analysis.annotate import transfer_labels
from scgpt_hf.analysis.embed import embed_anndata
from scgpt_hf.cells.h5ad.probe import require_readable
from scgpt_hf.cells.h5ad.validation import translate_read_errors
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


def annotate_file(
    path: str | Path, out: str | Path, annotate: Callable[[AnnData], dict[str, Any]], *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a copy of an .h5ad file with what `annotate` adds to obs, obsm and uns; return what it returns.

    The copy appears whole or not at all; `out` may be `path` itself.

    Args:
        path: the file.
        out: the copy.
        annotate: is given the cells, their counts still on disk.
        overwrite: replace `out`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is false.
        ValueError: the file cannot be read as h5ad; or what `annotate` raises.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another name, or overwrite it")
    adata = open_backed(path)
    before = {group: dict(getattr(adata, group)) for group in ("obsm", "uns")}
    try:
        report = annotate(adata)
        changed = {
            f"{group}/{key}": value
            for group, old in before.items()
            for key, value in getattr(adata, group).items()
            if value is not old.get(key)
        }
    finally:
        adata.file.close()
    beside = out.with_name(f".{out.name}.part")
    try:
        shutil.copyfile(path, beside)
        with h5py.File(beside, "r+") as file:
            for name, value in {"obs": adata.obs, **changed}.items():
                write_elem(file, name, value)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return report


def embed_and_transfer(
    query: AnnData,
    reference: AnnData,
    encoder: tuple[PreTrainedModel, ScGPTProcessor] | None,
    embedding: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Embed both by the encoder, or not if there is none, and transfer labels.

    Args:
        query: see `transfer_labels`.
        reference: see `transfer_labels`.
        encoder: model and processor.
        embedding: further arguments of `embed_anndata`.
        settings: further arguments of `transfer_labels`.
    """
    if encoder is not None:
        for adata in (reference, query):
            embed_anndata(adata, *encoder, **embedding)
    return transfer_labels(query, reference, **settings)


def open_backed(path: str | Path) -> AnnData:
    """Return the cells of an .h5ad file, the counts left on disk.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as h5ad.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    require_readable([str(path)])
    with translate_read_errors(str(path)):
        return anndata.read_h5ad(path, backed="r")
