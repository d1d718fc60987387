"""The cells of an .h5ad file embedded without reading the file into memory: a copy of it, with the vectors in `obsm`.

How a cell is embedded is decided in `embed.py`.
"""

import shutil
from pathlib import Path
from typing import Any, Unpack

import h5py
import numpy as np
from anndata.io import write_elem
from transformers import PreTrainedModel

from scgpt_hf.analysis.embed import KEY, EmbedSettings, describe_embedding, embed_batches, load_pair, require_free_key
from scgpt_hf.cells.h5ad.validation import translate_read_errors
from scgpt_hf.cells.source import open_source
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


def embed_file(
    path: str | Path,
    out: str | Path,
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    key: str = KEY,
    layer: str | None = None,
    overwrite: bool = False,
    **settings: Unpack[EmbedSettings],
) -> dict[str, Any]:
    """Write a copy of an .h5ad file with the embedding in it, a few thousand cells in memory at a time.

    The copy appears whole or not at all; `out` may be `path` itself. For the arguments and what raises see
    `embed_anndata`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is false.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another name, or overwrite it")
    source = open_source(path, layer=layer, primary_only=False)
    with translate_read_errors(str(path)), h5py.File(path) as file:
        taken = list(file.get("obsm", {}))
    require_free_key(key, taken, overwrite)
    model, processor = load_pair(model, processor)
    beside = out.with_name(f".{out.name}.part")
    try:
        shutil.copyfile(path, beside)
        with h5py.File(beside, "r+") as file:
            for group in {"obsm", "uns"} - file.keys():
                write_elem(file, group, {})
            cell_ids = source.obs().index.to_numpy(np.int64)
            rows = _create_rows(file, f"obsm/{key}", (len(cell_ids), model.config.hidden_size))
            n_embedded = 0
            for positions, vectors in embed_batches(source, cell_ids, model, processor, **settings):
                rows[positions] = vectors
                n_embedded += len(positions)
            report = describe_embedding(source, model, processor, settings)
            report["empty_cells"] = len(cell_ids) - n_embedded
            write_elem(file, f"uns/{key}", report)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return report


def _create_rows(file: Any, name: str, shape: tuple[int, int]) -> Any:
    """Return a new h5 dataset of NaN that anndata reads as an array; none of it is in memory."""
    growing = {"maxshape": (None, shape[1]), "fillvalue": np.nan}
    write_elem(file, name, np.full((1, shape[1]), np.nan, np.float32), dataset_kwargs=growing)
    file[name].resize(shape)
    return file[name]
