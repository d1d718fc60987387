"""One vector per cell from a pretrained model, for any source of cells or an AnnData; `embed_file.py` serves files.

How cells reach the model is decided in `inference.py`: without masks and without chance.
"""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, PreTrainedModel

from scgpt_hf.analysis.inference import Float32Array, RunSettings, run_batches
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.pipeline.genes import match_columns
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.pretrained import load_pretrained
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "X_scgpt"


class EmbedSettings(RunSettings, total=False):
    """How cells are embedded; what is left out takes the default.

    Attributes:
        normalize: scale each vector to length 1, true by default. Source: bowang-lab/scGPT:scgpt/tasks/cell_emb.py.
    """

    normalize: bool


def load_encoder(
    name: str | Path, device: str | None = None, model_class: Any = AutoModel
) -> tuple[PreTrainedModel, ScGPTProcessor]:
    """Return the model and the processor saved in a folder or a repository of the Hub.

    Args:
        name: the folder, or the repository's id.
        device: where the model goes; by default a GPU if there is one.
        model_class: an Auto class: the encoder alone, or with a head.

    Raises:
        OSError, ValueError: see `load_pretrained`.
    """
    model, processor, _ = load_pretrained(name, model_class)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor  # type: ignore[arg-type]


def embed_anndata(
    adata: "AnnData",
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    key: str = KEY,
    layer: str | None = None,
    overwrite: bool = False,
    **settings: Unpack[EmbedSettings],
) -> dict[str, Any]:
    """Write one vector per cell to `adata.obsm[key]`, and how it was made to `adata.uns[key]`; return the latter.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: folder or Hub repository, or a model that is loaded, on the device where it shall run.
        processor: of a loaded model.
        key: name of the embedding.
        layer: where the raw counts are, `X` by default.
        overwrite: replace an embedding of that name.
        settings: see `EmbedSettings`.

    Raises:
        ValueError: the key is taken, the counts are not raw, there is no cell, too few genes are known to the model, a
            cell expresses none of them, or model and processor do not belong together.
    """
    require_free_key(key, adata.obsm, overwrite)
    source = open_source(adata, layer=layer, primary_only=False)
    model, processor = load_pair(model, processor)
    cell_ids = source.obs().index.to_numpy(np.int64)
    embedding = embed_cells(source, cell_ids, model, processor, **settings)
    n_empty = int(np.isnan(embedding[:, 0]).sum())
    report = describe_embedding(source, model, processor, settings) | {"empty_cells": n_empty}
    adata.obsm[key], adata.uns[key] = embedding, report
    return report


def embed_cells(
    source: CellSource,
    cell_ids: Int64Array,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    **settings: Unpack[EmbedSettings],
) -> Float32Array:
    """Return one vector per cell in the order of the ids, float32 (cells, hidden).

    Args:
        source: where the cells are read.
        cell_ids: which cells, in any order, no repeats. Shape (cells,).
        model: any scGPT model; only its encoder runs, in inference mode, on the device where it is.
        processor: the model's.
        settings: see `EmbedSettings`.

    Raises:
        ValueError: as `embed_anndata`.
    """
    order = np.argsort(cell_ids)
    embedding = np.full((len(cell_ids), model.config.hidden_size), np.nan, np.float32)
    for positions, vectors in embed_batches(source, cell_ids[order], model, processor, **settings):
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
    """Yield positions in `cell_ids`, which ascend, and the vectors of these cells; empty cells are passed over.

    See `embed_cells` and `EmbedSettings` for the arguments and what raises.
    """
    encoder = model.base_model

    def embed(batch: Batch) -> torch.Tensor:
        vectors = encoder(**batch).cell_embedding.float()
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    return run_batches(embed, source, cell_ids, model, processor, **settings)


def umap_of(embedding: npt.NDArray[np.floating[Any]], seed: int) -> Float32Array:
    """Return a map of the cells, float32 (cells, 2): scanpy's neighbours and UMAP with their defaults.

    Args:
        embedding: shape (cells, hidden).
        seed: the same seed gives the same map on the same machine.

    Raises:
        ValueError: fewer than 4 cells, or values that are not finite.
    """
    if len(embedding) < 4:
        raise ValueError(f"a map needs at least 4 cells, found {len(embedding)}")
    if n_wrong := int((~np.isfinite(embedding)).any(axis=1).sum()):
        raise ValueError(f"{n_wrong:,} of {len(embedding):,} cells have no finite embedding; leave them out of the map")
    import scanpy
    from anndata import AnnData

    adata = AnnData(np.zeros((len(embedding), 1), np.float32), obsm={KEY: embedding})
    scanpy.pp.neighbors(adata, n_neighbors=min(15, len(embedding) - 1), use_rep=KEY, random_state=seed)
    scanpy.tl.umap(adata, random_state=seed)
    return np.asarray(adata.obsm["X_umap"], dtype=np.float32)


def load_pair(
    model: PreTrainedModel | str | Path, processor: ScGPTProcessor | None
) -> tuple[PreTrainedModel, ScGPTProcessor]:
    """Return a model and its processor, loaded where they are not yet."""
    if isinstance(model, str | Path):
        model, saved = load_encoder(model)
        return model, processor or saved
    if processor is None:
        raise ValueError("a loaded model needs its processor; pass both, or the folder or repository they come from")
    return model, processor


def require_free_key(key: str, obsm: Any, overwrite: bool) -> None:
    """Raise if there is an embedding of that name that shall stay."""
    if key in obsm and not overwrite:
        raise ValueError(f"obsm has a {key!r} already, of {sorted(obsm)}; choose another key, or overwrite it")


def describe_embedding(
    source: CellSource, model: PreTrainedModel, processor: ScGPTProcessor, settings: EmbedSettings
) -> dict[str, Any]:
    """Return what a reader of the embedding must know to make it again."""
    return {
        "model": model.name_or_path,
        "scgpt_hf": version("scgpt_hf"),
        "cells": len(source.obs()),
        "normalized": settings.get("normalize", True),
        "layer": source.describe()["layer"],
        "genes": match_columns(source.genes, processor)[1],
        **{name: getattr(processor, name) for name in ("cls_value", "n_bins", "max_tokens", "input_style")},
    }
