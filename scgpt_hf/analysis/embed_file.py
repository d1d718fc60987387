"""Embed the cells of an .h5ad file without reading it into memory: write a copy of it with the vectors in `obsm`.

`embed.py` decides how a cell is embedded.
"""

import shutil
from pathlib import Path
from typing import Any, Unpack

import h5py
import numpy as np
from anndata.io import write_elem
from transformers import PreTrainedModel

from scgpt_hf.analysis.embed import KEY, EmbedSettings, describe_embedding, embed_batches, validate_free_key
from scgpt_hf.cells.files.validation import translate_read_errors
from scgpt_hf.cells.source import open_source
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


def embed_file(
    path: str | Path,
    out: str | Path,
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    key_added: str = KEY,
    layer: str | None = None,
    overwrite: bool = False,
    **settings: Unpack[EmbedSettings],
) -> dict[str, Any]:
    """Embed the cells of an .h5ad file and write a copy of the file with the vectors in `obsm`.

    Memory holds a few thousand cells at a time. The copy is renamed to `out` once it is complete, so a failure leaves
    nothing behind.

    Args:
        path: the file, with raw counts; genes by Ensembl id or symbol.
        out: the copy; may be `path` itself.
        model: see `embed_anndata`.
        processor: see `embed_anndata`.
        key_added: see `embed_anndata`.
        layer: see `embed_anndata`.
        overwrite: replace `out`, and an embedding of that name.
        settings: see `EmbedSettings`.

    Returns:
        The report that is also written to `uns[key_added]`; see `embed_anndata`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is false.
        ValueError: see `embed_anndata`; or the file cannot be read as h5ad.

    Example:
        >>> embed_file("cells.h5ad", "embedded.h5ad", "runs/demo/best_model", batch_size=256)["cells"]
        700
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another name, or overwrite it")
    source = open_source(path, layer=layer, primary_only=False)
    with translate_read_errors(str(path)), h5py.File(path) as file:
        existing = list(file.get("obsm", {}))
    validate_free_key(key_added, existing, overwrite)
    model, processor = load_model(model, processor)
    genes = match_source_genes(source.genes, processor)
    # In the same folder, because a file can be renamed in one step only within a file system.
    temporary = out.with_name(f".{out.name}.part")
    try:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+") as file:
            for group in {"obsm", "uns"} - file.keys():
                write_elem(file, group, {})
            cell_ids = source.obs().index.to_numpy(np.int64)
            rows = _create_rows(file, f"obsm/{key_added}", (len(cell_ids), model.config.hidden_size))
            n_embedded = 0
            for positions, vectors in embed_batches(source, cell_ids, model, processor, gene_match=genes, **settings):
                rows[positions] = vectors
                n_embedded += len(positions)
            report = describe_embedding(source, genes, model, processor, settings)
            report["empty_cells"] = len(cell_ids) - n_embedded
            write_elem(file, f"uns/{key_added}", report)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _create_rows(file: Any, name: str, shape: tuple[int, int]) -> Any:
    """Create an h5 dataset of NaN that anndata reads as an array, without holding it in memory."""
    # anndata writes one row with its metadata; h5py then extends the dataset, whose fill value is NaN.
    growing = {"maxshape": (None, shape[1]), "fillvalue": np.nan}
    write_elem(file, name, np.full((1, shape[1]), np.nan, np.float32), dataset_kwargs=growing)
    file[name].resize(shape)
    return file[name]
