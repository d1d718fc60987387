"""Embed the cells of an .h5ad file without reading it into memory: write a copy of it with the vectors in `obsm`.

`embed.py` decides how a cell is embedded.
"""

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from transformers import PreTrainedModel

from scgpt_hf.analysis.embed import KEY, describe_embedding, validate_free_key
from scgpt_hf.cells.files.additions import create_rows, open_copy, write_plainly
from scgpt_hf.cells.files.elements import write_element
from scgpt_hf.cells.source import open_source
from scgpt_hf.inference import EmbedSettings, embed_batches
from scgpt_hf.output import require_writable_file, write_beside
from scgpt_hf.packaged_models import DEFAULT_MODEL
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


def embed_file(
    path: str | Path,
    out: str | Path,
    model: PreTrainedModel | str | Path = DEFAULT_MODEL,
    processor: ScGPTProcessor | None = None,
    *,
    key_added: str = KEY,
    layer: str | None = None,
    round_counts: bool = False,
    overwrite: bool = False,
    **settings: Unpack[EmbedSettings],
) -> dict[str, Any]:
    """Embed the cells of a file and write a copy of it with the vectors in `obsm`, as `.h5ad`.

    Memory holds a few thousand cells at a time. The file is copied first, so an error of writing comes before the
    computation. The copy is renamed to `out` once it is complete; a failure before all cells are embedded leaves
    nothing behind.

    Args:
        path: the file, with raw counts; genes by Ensembl id or symbol.
        out: the copy; may be `path` itself.
        model: see `embed_anndata`.
        processor: see `embed_anndata`.
        key_added: see `embed_anndata`.
        layer: see `embed_anndata`.
        round_counts: see `embed_anndata`.
        overwrite: replace `out`, and an embedding of that name.
        settings: see `EmbedSettings`.

    Returns:
        The report that is also written to `uns[key_added]`; see `embed_anndata`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is false.
        OSError: `out` cannot be written. If the cells were embedded already, the message says where the vectors are.
        ValueError: see `embed_anndata`; or the file cannot be read as h5ad.

    Example:
        >>> embed_file("cells.h5ad", "embedded.h5ad", "runs/demo/best_model", batch_size=256)["cells"]
        700
    """
    require_writable_file(out, overwrite=overwrite)
    source = open_source(path, layer=layer, primary_only=False, round_counts=round_counts)
    model, processor = load_model(model, processor)
    genes = match_source_genes(source.genes, processor)
    report = describe_embedding(source, genes, model, processor, settings)
    with open_copy(path, out, overwrite=overwrite) as file:
        validate_free_key(key_added, file["obsm"], overwrite)
        cell_ids = source.obs().index.to_numpy(np.int64)
        rows = create_rows(file, f"obsm/{key_added}", (len(cell_ids), model.config.hidden_size))
        n_embedded = 0
        for positions, vectors in embed_batches(source, cell_ids, model, processor, gene_match=genes, **settings):
            rows[positions] = vectors
            n_embedded += len(positions)
        report["empty_cells"] = len(cell_ids) - n_embedded
        try:
            write_element(file, f"uns/{key_added}", report)
            file.flush()
        except Exception as error:
            additions = {f"obsm/{key_added}": rows, f"uns/{key_added}": report}
            raise write_beside(out, partial(write_plainly, additions=additions), error) from error
    return report
