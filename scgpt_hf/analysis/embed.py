"""Embed cells: one vector per cell from a pretrained model, for any source of cells or an AnnData.

`inference.py` decides how cells reach the model; `embed_file.py` embeds files without reading them into memory.
"""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from scgpt_hf.analysis.inference import Float32Array, InferenceSettings, iterate_outputs
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.source import CellSource
from scgpt_hf.pipeline.genes import GeneMatch, match_source_genes
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "X_scgpt"


class EmbedSettings(InferenceSettings, total=False):
    """How cells are embedded.

    Attributes:
        normalize: scale each vector to length 1, true by default. Source: bowang-lab/scGPT:scgpt/tasks/cell_emb.py.
    """

    normalize: bool


def embed_anndata(
    adata: "AnnData",
    model: PreTrainedModel | str | Path,
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
        model: folder or Hub repository, or a loaded model, which runs on the device where it is.
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
    source = AnnDataSource(adata, layer=layer, primary_only=False, round_counts=round_counts)
    model, processor = load_model(model, processor)
    genes = match_source_genes(source.genes, processor)
    cell_ids = source.obs().index.to_numpy(np.int64)
    embedding = embed_cells(source, cell_ids, model, processor, gene_match=genes, **settings)
    n_empty = int(np.isnan(embedding[:, 0]).sum())
    report = describe_embedding(source, genes, model, processor, settings) | {"empty_cells": n_empty}
    adata.obsm[key_added], adata.uns[key_added] = embedding, report
    return report


def embed_cells(
    source: CellSource,
    cell_ids: Int64Array,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    *,
    gene_match: GeneMatch | None = None,
    **settings: Unpack[EmbedSettings],
) -> Float32Array:
    """Embed some cells of a source and return their vectors in the order of the ids.

    Args:
        source: source of the cells, as `open_source` returns it.
        cell_ids: which cells, in any order, no repeats. Shape (cells,).
        model: any scGPT model; only its encoder runs, in evaluation mode, on the device where it is.
        processor: the processor of the model.
        gene_match: what `match_source_genes` returns, for callers that have called it; by default it is called.
        settings: see `EmbedSettings`.

    Returns:
        Vectors, float32 (cells, hidden); NaN for empty cells with `empty="nan"`.

    Raises:
        ValueError: see `embed_anndata`.

    Example:
        >>> source = open_source("census://2025-11-08/homo_sapiens", obs_filter="tissue_general == 'blood'")
        >>> cell_ids = source.obs().index.to_numpy()[:1000]
        >>> embed_cells(source, cell_ids, model, processor).shape
        (1000, 512)
    """
    order = np.argsort(cell_ids)
    embedding = np.full((len(cell_ids), model.config.hidden_size), np.nan, np.float32)
    batches = embed_batches(source, cell_ids[order], model, processor, gene_match=gene_match, **settings)
    for positions, vectors in batches:
        embedding[order[positions]] = vectors
    return embedding


def embed_batches(
    source: CellSource,
    cell_ids: Int64Array,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    *,
    normalize: bool = True,
    **settings: Any,
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Yield the vectors of cells, batch by batch, with the positions of these cells in `cell_ids`.

    Args:
        source: see `embed_cells`.
        cell_ids: ascending ids. Shape (cells,).
        model: see `embed_cells`.
        processor: see `embed_cells`.
        normalize: see `EmbedSettings`.
        settings: further arguments of `iterate_outputs`.
    """
    encoder = model.base_model

    def embed(batch: Batch) -> torch.Tensor:
        vectors = encoder(**batch).cell_embedding.float()
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    return iterate_outputs(embed, source, cell_ids, model, processor, **settings)


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
            "view; pass adata.to_memory(), or embed the file with embed_file (scripts/embed.py)"
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
        "cells": len(source.obs()),
        "normalized": settings.get("normalize", True),
        **{name: value for name, value in source.describe().items() if name in ("layer", "round_counts")},
        "genes": genes.coverage,
        **{name: getattr(processor, name) for name in ("cls_value", "n_bins", "max_tokens", "input_style")},
    }
