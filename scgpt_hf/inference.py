"""Run an scGPT model over cells in inference mode, without randomness: a result depends on the content of its cell.

Batches come from the pipeline that also serves training (`pipeline/stream.py`), configured by `inference_config`: no
masks, ties in the middle of their bins, and a cell with too many genes sampled by its content. `iterate_outputs` runs
what a caller computes from a batch; `embed_cells` computes the embedding.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from scgpt_hf.cells.block import CHUNK_SIZE, Int64Array
from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.pipeline.genes import GeneMatch
from scgpt_hf.pipeline.stream import Batch, CellStream, StreamConfig
from scgpt_hf.pretrained import domain_classes, validate_pair
from scgpt_hf.progress_bar import progress_bar
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

Float32Array = npt.NDArray[np.float32]


class InferenceSettings(TypedDict, total=False):
    """How a model runs over cells.

    Attributes:
        batch_size: cells per batch, 64 by default; changes speed and memory, not the result.
        empty: what to do with cells that express no gene of the model's vocabulary: "raise" an error (default), or
            give them a row of NaN, "nan".
        progress: show a progress bar, true by default.
    """

    batch_size: int
    empty: Literal["raise", "nan"]
    progress: bool


class EmbedSettings(InferenceSettings, total=False):
    """How cells are embedded.

    Attributes:
        normalize: scale each vector to length 1, true by default. Source: bowang-lab/scGPT:scgpt/tasks/cell_emb.py.
    """

    normalize: bool


def inference_config(config: ScGPTConfig, empty: Literal["raise", "nan"] = "raise") -> StreamConfig:
    """Return how the pipeline makes batches for inference.

    Args:
        config: config of the model, which may count padding and may need the domain of each cell.
        empty: see `InferenceSettings`.

    Raises:
        ValueError: the encoder needs domains, and the config does not list them.
    """
    return StreamConfig(
        seed=0,
        padded=bool(config.padding_dependent_settings),
        categories=domain_classes(config),
        ties="midpoint",
        key_by="content",
        empty_cells="raise" if empty == "raise" else "skip",
        with_cell_ids=True,
    )


@torch.inference_mode()
def iterate_outputs(
    compute: Callable[[Batch], torch.Tensor],
    source: CellSource,
    cell_ids: Int64Array,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    *,
    gene_match: GeneMatch | None = None,
    cells_per_window: int | None = None,
    batch_size: int = 64,
    empty: Literal["raise", "nan"] = "raise",
    progress: bool = True,
    description: str = "embedding",
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Yield the results of batches of cells; cells without a known gene have none.

    Args:
        compute: maps a batch on the model's device to one row per cell.
        source: source of the cells.
        cell_ids: which cells to read, ascending, no repeats. Shape (cells,).
        model: the model that `compute` runs; it is in evaluation mode until the last batch.
        processor: the processor of the model.
        gene_match: see `CellStream`.
        cells_per_window: cells that are read together; one chunk by default.
        batch_size: see `InferenceSettings`.
        empty: see `InferenceSettings`.
        progress: see `InferenceSettings`.
        description: label of the progress bar.

    Yields:
        Positions in `cell_ids` of the cells of a batch, int64 (cells,), and what `compute` returned, on the CPU.

    Raises:
        ValueError: see `embed_anndata`.
    """
    validate_pair(model, processor)
    if not len(cell_ids):
        return
    config: Any = model.config
    plan = plan_validation(cell_ids, batch_size, cells_per_window=cells_per_window or CHUNK_SIZE)
    stream = CellStream(source, [plan], processor, inference_config(config, empty), gene_match=gene_match)
    with (
        evaluation_mode(model),
        closing(prefetch(stream.batches())) as batches,
        progress_bar(total=len(cell_ids), unit="cells", description=description, show=progress) as bar,
    ):
        for batch in batches:
            positions = np.searchsorted(cell_ids, np.asarray(batch.pop("cell_ids")))
            rows = compute(move_batch(batch, model.device))
            bar.update(len(positions))
            yield positions, rows.cpu().numpy()


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
        >>> source = open_source(demo_cells())  # or "census://2025-11-08/homo_sapiens", or files
        >>> cell_ids = source.obs().index.to_numpy()[:100]
        >>> embed_cells(source, cell_ids, model, processor, progress=False).shape
        (100, 64)
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


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and restore the mode of the model afterwards."""
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.train(training)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a batch whose tensors are on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
