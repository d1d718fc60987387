"""Fit simple methods to a sample of the training cells, and keep them in the run folder as baselines of the run.

`scgpt_hf.scoring` defines the methods. `evaluate` compares the model with them on any data.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from scgpt_hf.cells.missing import fill_missing
from scgpt_hf.cells.source import CellSource
from scgpt_hf.scoring.count_mlp import MLP_FILE, fit_count_mlp
from scgpt_hf.scoring.fitted_pca import PCA_FILE, FittedPCA, fit_pca
from scgpt_hf.scoring.metrics import Labels
from scgpt_hf.scoring.sampling import sample_chunks
from scgpt_hf.training.selection import Selection
from scgpt_hf.training.settings import Settings

logger = logging.getLogger(__name__)

SAMPLE_CELLS = 20_000  # PCA and network are about as good as with more, and fit in less than a minute


class TrainingSample(NamedTuple):
    """A sample of the training cells.

    Attributes:
        counts: raw counts. Shape (cells, genes).
        genes: id of each column. Shape (genes,).
        batches: experimental batch of each cell. Shape (cells,).
        selected: genes of the run if it uses variable genes; None if it uses all genes.
    """

    counts: csr_matrix
    genes: list[str]
    batches: Labels
    selected: list[str] | None


def read_training_sample(source: CellSource, selection: Selection, settings: Settings) -> TrainingSample:
    """Read up to 20,000 training cells, which the seed of the run determines.

    Batches are those of `batch_key`, by default the data sets, and the donors where there are none.
    """
    cell_ids = sample_chunks(selection.parts["train"], SAMPLE_CELLS, settings.training.seed, source.chunk_size)
    column = settings.data.batch_key or "dataset_id"
    if column not in source.obs_columns:
        column = settings.data.donor_key
    block = source.read(cell_ids, [column])
    genes = source.genes["feature_id"].astype(str).tolist()
    selected = selection.genes if settings.data.gene_selection == "hvg" else None
    return TrainingSample(block.counts, genes, np.asarray(fill_missing(block.obs[column]), dtype=str), selected)


def fit_training_pca(sample: TrainingSample, seed: int) -> FittedPCA:
    """Fit the PCA of a run: on its variable genes, or on variable genes of the sample if it uses all."""
    return fit_pca(sample.counts, sample.genes, sample.batches, seed, selected=sample.selected)


def save_simple_methods(source: CellSource, selection: Selection, settings: Settings) -> None:
    """Fit the methods that the setting `fit_baselines` names, and write them into the run folder.

    The first process calls it at the end of a run. "pca" takes seconds, "all" adds the network with the count decoder,
    which takes up to a minute. A method that cannot be fitted is logged: the run is complete without it.
    """
    args, folder = settings.training, Path(settings.training.output_dir)
    if args.fit_baselines == "none":
        return
    try:
        sample = read_training_sample(source, selection, settings)
        fit_training_pca(sample, args.seed).save(folder / PCA_FILE)
        if args.fit_baselines == "all":
            logger.info("fitting a small network to %d training cells, as a baseline", sample.counts.shape[0])
            network = fit_count_mlp(
                sample.counts, sample.genes, sample.batches, seed=args.seed, selected=sample.selected
            )
            network.save(folder / MLP_FILE)
    except (ValueError, OSError) as error:
        logger.warning("the baselines of the run are incomplete, because one could not be fitted: %s", error)
