"""Embed the cells of an AnnData: one vector per cell from a pretrained model.

`scgpt_hf/inference.py` runs the model over the cells; `embed_file.py` embeds files without reading them into memory.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt
from scipy.sparse import issparse
from transformers import PreTrainedModel

from scgpt_hf.cells.block import FloatArray
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.inference import EmbedSettings, Float32Array, embed_cells
from scgpt_hf.packaged_models import DEFAULT_MODEL
from scgpt_hf.pipeline.genes import GeneMatch, match_source_genes
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "X_scgpt"


def embed_anndata(
    adata: "AnnData",
    model: PreTrainedModel | str | Path = DEFAULT_MODEL,
    processor: ScGPTProcessor | None = None,
    *,
    key_added: str = KEY,
    layer: str | None = None,
    round_counts: bool = False,
    overwrite: bool = False,
    **settings: Unpack[EmbedSettings],
) -> dict[str, Any]:
    """Embed the cells of an AnnData and write the vectors to `adata.obsm[key_added]`.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: folder or Hub repository, or a loaded model, which runs on the device where it is. By default the small
            model of human blood and marrow cells that comes with the package, see `packaged_model`.
        processor: the processor of a loaded model.
        key_added: name of the embedding in `obsm`, and of the report in `uns`.
        layer: layer with the raw counts; by default `X`, or the only other one that has them, see `AnnDataSource`.
        round_counts: round fractional counts.
        overwrite: replace an embedding of that name.
        settings: see `EmbedSettings`.

    Returns:
        The report that is also written to `adata.uns[key_added]`: the model, the number of cells and of empty cells,
        the genes that were matched, and the settings of the tokens.

    Raises:
        ValueError: the key exists, the counts are not raw, there is no cell, too few genes are in the vocabulary, a
            cell expresses none of them, or model and processor do not fit together.

    Example:
        >>> report = embed_anndata(adata, "runs/demo/best_model")
        >>> adata.obsm["X_scgpt"].shape
        (700, 64)
    """
    validate_not_backed_view(adata)
    validate_free_key(key_added, adata.obsm, overwrite)
    source = open_source(adata, layer=layer, primary_only=False, round_counts=round_counts)
    model, processor = load_model(model, processor)
    genes = match_source_genes(source.genes, processor)
    cell_ids = source.obs().index.to_numpy(np.int64)
    embedding = embed_cells(source, cell_ids, model, processor, gene_match=genes, **settings)
    n_empty = int(np.isnan(embedding[:, 0]).sum())
    report = describe_embedding(source, genes, model, processor, settings) | {"empty_cells": n_empty}
    adata.obsm[key_added], adata.uns[key_added] = embedding, report
    return report


def umap_of(embedding: npt.NDArray[np.floating[Any]], seed: int) -> Float32Array:
    """Compute a UMAP of an embedding with scanpy's default neighbors and UMAP.

    Args:
        embedding: shape (cells, hidden).
        seed: the same seed gives the same map on the same machine.

    Returns:
        Coordinates, float32 (cells, 2).

    Raises:
        ValueError: fewer than 4 cells, or values that are not finite.
    """
    if len(embedding) < 4:
        raise ValueError(f"a UMAP needs at least 4 cells, found {len(embedding)}")
    if n_wrong := int((~np.isfinite(embedding)).any(axis=1).sum()):
        raise ValueError(f"{n_wrong:,} of {len(embedding):,} cells have no finite embedding; leave these cells out")
    import scanpy
    from anndata import AnnData

    adata = AnnData(np.zeros((len(embedding), 1), np.float32), obsm={KEY: embedding})
    scanpy.pp.neighbors(adata, n_neighbors=min(15, len(embedding) - 1), use_rep=KEY, random_state=seed)
    scanpy.tl.umap(adata, random_state=seed)
    return np.asarray(adata.obsm["X_umap"], dtype=np.float32)


def embedding_of(adata: "AnnData", key: str) -> FloatArray:
    """Return `obsm[key]` as an array; it may also be stored as a sparse matrix or a table. Shape (cells, hidden)."""
    vectors = adata.obsm[key]
    return np.asarray(vectors.toarray() if issparse(vectors) else vectors)


def validate_free_key(key: str, obsm: Any, overwrite: bool) -> None:
    """Raise an error if an embedding cannot have this name, or exists and must not be replaced.

    Raises:
        ValueError: the name has a slash, or it exists.
    """
    validate_name(key)
    if key in obsm and not overwrite:
        raise ValueError(f"obsm has a {key!r} already, of {sorted(obsm)}; choose another key, or overwrite it")


def validate_name(key: str) -> None:
    """Raise a ValueError if an .h5ad file cannot hold a column or an embedding of this name."""
    if "/" in key or not key:
        raise ValueError(f"{key!r} cannot be the name of a column or an embedding in a file; choose one without '/'")


def validate_not_backed_view(adata: "AnnData") -> None:
    """Raise a ValueError if an AnnData is a view of one that is backed by a file: nothing can be added to it."""
    if adata.is_view and adata.isbacked:
        raise ValueError(
            f"the AnnData is a view of {adata.filename}, which is open in backed mode; nothing can be added to such a "
            "view; pass adata.to_memory(), or embed the file with embed_file (scgpt-hf embed)"
        )


def describe_embedding(
    source: CellSource,
    genes: GeneMatch,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    settings: EmbedSettings,
) -> dict[str, Any]:
    """Return the settings that reproduce an embedding, as `embed_anndata` writes them to `uns`."""
    return {
        "model": model.name_or_path,
        "scgpt_hf": version("scgpt_hf"),
        "cells": source.describe()["n_cells"],
        "normalized": settings.get("normalize", True),
        **{name: value for name, value in source.describe().items() if name in ("layer", "round_counts")},
        "genes": genes.coverage,
        **{name: getattr(processor, name) for name in ("cls_value", "n_bins", "max_tokens", "input_style")},
    }
