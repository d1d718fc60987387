"""Write the figures and the report of a finished pretraining run: loss curves, UMAP of its cells, report page."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from scgpt_hf.analysis.embed import umap_of
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.source import CellSource
from scgpt_hf.inference import embed_cells
from scgpt_hf.publishing.record import read_metrics
from scgpt_hf.publishing.run_summary import read_summary
from scgpt_hf.reporting.curves import plot_loss
from scgpt_hf.reporting.plots import UMAP_CELLS, plot_umap, save_figure
from scgpt_hf.reporting.report import write_report
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

logger = logging.getLogger(__name__)


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

    The UMAP shows up to 5,000 cells chosen at random, colored by cell type and by donor.

    Args:
        folder: run folder, with metrics.jsonl and summary.json.
        source: source of the cells.
        parts: name of each part → ids of its cells. Shape (cells,).
        model: embeds the cells.
        processor: processor of the model.
        donor_key: obs column that colors the second panel of the UMAP.
        seed: seed of the choice of the cells, and of UMAP.
    """
    best_step = read_summary(folder).get("best.step", int)
    save_figure(plot_loss(read_metrics(folder / "metrics.jsonl"), best_step=best_step), folder / "loss.png")
    if cause := model.config.padding_dependent_settings:
        # The figure would change with the batch size.
        logger.warning("umap.png is not written: with %s, an embedding depends on the padding of its batch", cause)
    else:
        chosen = np.random.default_rng(seed).permutation(np.concatenate(list(parts.values())))[:UMAP_CELLS]
        embedding = embed_cells(source, chosen, model, processor, empty="nan", progress=False)
        embedded = np.isfinite(embedding).all(axis=1)  # cells without an expressed gene of the vocabulary are NaN
        columns = [column for column in dict.fromkeys(("cell_type", donor_key)) if column in source.obs_columns]
        obs = source.read(chosen[embedded], columns).obs
        panels = {column.replace("_", " ").removesuffix(" id"): obs[column].tolist() for column in columns}
        title = f"{embedded.sum():,} cells embedded by the model"
        save_figure(plot_umap(umap_of(embedding[embedded], seed), panels, title=title), folder / "umap.png")
    write_report(folder)
