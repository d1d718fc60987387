"""What closes a run: the schedule of its losses, its cells on a map, and a page that tells of both."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from scgpt_hf.analysis.embed import embed_cells, umap_of
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.source import CellSource
from scgpt_hf.reporting.curves import plot_loss, read_metrics
from scgpt_hf.reporting.plots import plot_umap, save_figure
from scgpt_hf.reporting.report import write_report
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

logger = logging.getLogger(__name__)

# A map of more cells says no more, and UMAP takes minutes.
MAPPED_CELLS = 5_000


def write_run_figures(
    folder: Path,
    source: CellSource,
    parts: Mapping[str, Int64Array],
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    *,
    donor_key: str,
    seed: int,
) -> None:
    """Write loss.png, umap.png and report.html into the folder of a finished run.

    Args:
        folder: of the run, with its metrics.jsonl and summary.json.
        source: where the cells are read.
        parts: name of each part → ids of its cells.
        model: embeds them.
        processor: the model's.
        donor_key: obs column of the map's second panel.
        seed: of the cells that are drawn, and of the map.
    """
    save_figure(plot_loss(read_metrics(folder / "metrics.jsonl")), folder / "loss.png")
    cell_ids = np.concatenate(list(parts.values()))
    draw_map(folder, source, cell_ids, model, processor, donor_key=donor_key, seed=seed)
    write_report(folder)


def draw_map(
    folder: Path,
    source: CellSource,
    cell_ids: Int64Array,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    *,
    donor_key: str,
    seed: int,
) -> None:
    """Write umap.png: the embedded cells, or 5,000 of them drawn at random, coloured by cell type and by donor.

    Args:
        folder: of the run.
        source: where the cells are read.
        cell_ids: the cells that may be drawn. Shape (cells,).
        model: embeds them.
        processor: the model's.
        donor_key: obs column of the second panel.
        seed: of the draw and of the map.
    """
    if counted := model.config.counts_padding:
        logger.warning("no umap.png: with %s a cell's embedding depends on the cells beside it", counted)
        return
    drawn = np.random.default_rng(seed).permutation(cell_ids)[:MAPPED_CELLS]
    embedding = embed_cells(source, drawn, model, processor, empty="nan", progress=False)
    told = np.isfinite(embedding).all(axis=1)
    columns = [column for column in dict.fromkeys(("cell_type", donor_key)) if column in source.columns]
    obs = source.read(drawn[told], columns).obs
    panels = {column.replace("_", " ").removesuffix(" id"): obs[column].tolist() for column in columns}
    title = f"{told.sum():,} cells embedded by the model"
    save_figure(plot_umap(umap_of(embedding[told], seed), panels, title=title), folder / "umap.png")
