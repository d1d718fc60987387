"""One vector per cell from a pretrained model, for any source of cells or an AnnData; `embed_file.py` serves files.

Cells go through the processor as in pretraining, without masks and without chance: ties take the middle of their bins
and a cell with too many genes is sampled by its own content. So a cell's vector depends on the cell alone.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from copy import copy
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from scgpt_hf.analysis.genes import match_columns
from scgpt_hf.cells.block import Int64Array, require_counts
from scgpt_hf.cells.plan import BAND_SIZE, plan_validation
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.stream import Batch, read_ahead
from scgpt_hf.tokens.packing_scgpt import pack
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

Float32Array = npt.NDArray[np.float32]
KEY = "X_scgpt"


class EmbedSettings(TypedDict, total=False):
    """How cells are embedded; what is left out takes the default.

    Attributes:
        batch_size: cells the model takes at once, 64 by default; changes speed and memory, not the result.
        normalize: scale each vector to length 1, true by default. Source: bowang-lab/scGPT:scgpt/tasks/cell_emb.py.
        empty: cells that express no gene the model knows are an error, "raise" (default), or a row of NaN, "nan".
        progress: show a bar, true by default.
    """

    batch_size: int
    normalize: bool
    empty: Literal["raise", "nan"]
    progress: bool


def load_encoder(name: str | Path, device: str | None = None) -> tuple[PreTrainedModel, ScGPTProcessor]:
    """Return the model and the processor saved in a folder or a repository of the Hub.

    Args:
        name: the folder, or the repository's id.
        device: where the model goes; by default a GPU if there is one.

    Raises:
        OSError: there is no such folder or repository, or it holds no model.
        ValueError: the folder is a run's, which has its model one folder deeper.
    """
    if Path(name, "best_model").is_dir():
        raise ValueError(f"{name} is the folder of a run; its model is {Path(name, 'best_model')}")
    model = AutoModel.from_pretrained(name)
    if model.config.model_type != ScGPTConfig.model_type:
        raise ValueError(f"{name} holds a {model.config.model_type!r} model, not one of scgpt")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), AutoProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]


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


@torch.inference_mode()
def embed_batches(
    source: CellSource,
    cell_ids: Int64Array,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    *,
    batch_size: int = 64,
    normalize: bool = True,
    empty: Literal["raise", "nan"] = "raise",
    progress: bool = True,
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Yield positions in `cell_ids`, which ascend, and the vectors of these cells; empty cells are passed over.

    See `embed_cells` and `EmbedSettings` for the arguments and what raises.
    """
    if model.config.vocab_size != processor.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocab_size:,} genes and special tokens, the processor "
            f"{processor.vocab_size:,}; load both from one folder"
        )
    if not len(cell_ids):
        return
    encoder, training = model.base_model, model.training
    model.eval()  # type: ignore[no-untyped-call]
    batches = read_ahead(_read_batches(source, cell_ids, processor, batch_size, empty))
    try:
        with closing(batches), tqdm(total=len(cell_ids), unit="cell", desc="embedding", disable=not progress) as bar:
            for batch in batches:
                positions = np.asarray(batch.pop("positions"))
                on_device = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                vectors = encoder(**on_device).cell_embedding.float()
                vectors = torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors
                bar.update(len(positions))
                yield positions, vectors.cpu().numpy()
    finally:
        if training:
            model.train()


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


def _read_batches(
    source: CellSource, cell_ids: Int64Array, processor: ScGPTProcessor, batch_size: int, empty: str
) -> Iterator[Batch]:
    """Yield packed batches of the cells that are not empty, each with the `positions` of its cells in `cell_ids`.

    Not `stream_cells`: that keys samples by cell id, and these ids are row numbers, which change when a file is cut.
    """
    plan = plan_validation(cell_ids, batch_size, cells_per_block=BAND_SIZE)
    processor = copy(processor)
    processor.ties = "midpoint"
    gene_ids, coverage = match_columns(source.genes, processor)
    logger.info("genes: %s", coverage)
    first = 0
    for index in range(plan.n_blocks):
        ids = np.concatenate(plan.steps(index))
        counts = source.read(ids).counts
        require_counts(counts, where=f"cells {ids[0]:,} to {ids[-1]:,}")
        expressing = processor.count_known(counts, gene_ids) > 0
        if empty == "raise" and not expressing.all():
            raise ValueError(
                f"{(~expressing).sum():,} of the cells {ids[0]:,} to {ids[-1]:,} express no gene that the model knows, "
                f"first ids: {ids[~expressing][:5].tolist()}; leave them out, or pass empty='nan' to get rows of NaN"
            )
        tokens = processor.tokenize(counts, gene_ids, seed=0, epoch=0)
        positions = first + np.flatnonzero(expressing)
        for start in range(0, len(tokens), batch_size):
            cells = slice(start, start + batch_size)
            yield pack(tokens[cells]) | {"positions": torch.from_numpy(positions[cells])}
        first += len(ids)


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
        raise ValueError(f"obsm has a {key!r} already, beside {sorted(obsm)}; choose another key, or overwrite it")


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
