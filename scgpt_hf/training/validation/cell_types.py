"""Watch biology while training: score the cell embedding of labelled held-out cells at every validation.

The setting `eval_labels` names the obs column. The scores of the model stand beside those of a PCA that is fitted to
training cells and applied to the same cells: a model that is worse than PCA has learned little about cells.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from scgpt_hf.cells.missing import fill_missing, has_label
from scgpt_hf.cells.obs import require_named_columns, take_cells
from scgpt_hf.cells.source import CellSource
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.scoring.embedding_scores import LabelledCells, score_embedding
from scgpt_hf.scoring.sampling import KEPT_PER_LABEL, sample_cells
from scgpt_hf.training.data_module import DataModule
from scgpt_hf.training.fault_tolerance.ranks import on_first_process
from scgpt_hf.training.selection import Selection
from scgpt_hf.training.settings import Settings
from scgpt_hf.training.validation.simple_methods import fit_training_pca, read_training_sample

logger = logging.getLogger(__name__)

MAX_CELLS = 3_000  # their scores take seconds
Embed = Callable[[Batch], torch.Tensor]


class CellTypeScorer:
    """Scores the embedding of labelled validation cells.

    Their batches are read once and kept, so that a validation only embeds and scores.

    Attributes:
        cells: the cells, of all processes.
        pca_scores: scores of PCA on the same cells; a score that cannot be computed for these cells is missing.
    """

    def __init__(
        self, cells: LabelledCells, batches: Sequence[Batch], n_batches: int, pca_scores: dict[str, float], seed: int
    ) -> None:
        """Keep what every validation needs.

        Args:
            cells: see `CellTypeScorer`.
            batches: those of this process, with `cell_ids`.
            n_batches: number of batches of all processes.
            pca_scores: see `CellTypeScorer`.
            seed: determines the folds of a single donor.
        """
        self.cells, self.n_batches, self.pca_scores = cells, n_batches, pca_scores
        self._batches, self._seed = batches, seed
        self._has_logged_time = False

    @property
    def names(self) -> list[str]:
        """Names of the scores in the log, without `eval_`."""
        return [*self.pca_scores, *(f"pca_{name}" for name in self.pca_scores)]

    def score(self, embed: Embed, *, same_calls: bool = False) -> dict[str, float]:
        """Return the scores of the model and of PCA, on all processes. All of them have to call it.

        Args:
            embed: maps a batch to the embeddings of its cells, (cells, hidden).
            same_calls: call `embed` equally often on each process, as a sharded model needs it.

        Raises:
            ValueError: an embedding is not finite.
        """
        started = time.perf_counter()
        own = [(batch["cell_ids"].numpy(), embed(batch)) for batch in self._batches]  # type: ignore[union-attr]
        if same_calls and len(own) < math.ceil(self.n_batches / PartialState().num_processes):
            embed(self._batches[-1])  # a process has at most one batch less than another
        found: list[Any] = gather_object([(ids, vectors.cpu().numpy()) for ids, vectors in own])
        embedded = time.perf_counter()
        scores = on_first_process(lambda: self._score(found))
        if not self._has_logged_time:
            self._has_logged_time = True
            n_cells, seconds = len(self.cells.labels), time.perf_counter() - embedded
            line = "cell types: %d labelled cells of each validation embedded in %.1f s and scored in %.1f s"
            logger.info(line, n_cells, embedded - started, seconds)
        return {**scores, **{f"pca_{name}": value for name, value in self.pca_scores.items()}}

    def _score(self, found: list[Any]) -> dict[str, float]:
        ids, vectors = (np.concatenate(part) for part in zip(*found, strict=True))
        scores, reasons = score_embedding(vectors[np.argsort(ids)], self.cells, self._seed)
        for name in self.pca_scores.keys() & reasons.keys():
            logger.warning("%s cannot be computed for this embedding: %s", name, reasons[name])
        return {name: scores[name] for name in self.pca_scores if name in scores}


def make_cell_type_scorer(
    source: CellSource, selection: Selection, data_module: DataModule, settings: Settings
) -> CellTypeScorer | None:
    """Select and read labelled validation cells, and score PCA on them. None without the setting `eval_labels`.

    The first process selects the cells and fits PCA; each reads its own batches.

    Raises:
        ValueError: obs has no such column, too few validation cells have a label, or no score can be computed.
    """
    if settings.training.eval_labels is None:
        return None
    seed = settings.training.seed

    def prepare() -> tuple[LabelledCells, dict[str, float]]:
        cells = select_labelled_cells(source, selection, settings)
        sample = read_training_sample(source, selection, settings)
        embedding = fit_training_pca(sample, seed).transform(source.read(cells.cell_ids).counts, sample.genes)
        scores, reasons = score_embedding(embedding, cells, seed)
        for name, reason in reasons.items():
            logger.warning("validations do not have %s: %s", name, reason)
        if not scores:
            raise ValueError(f"eval_labels: no score can be computed for these cells: {reasons}; choose another column")
        return cells, scores

    cells, pca_scores = on_first_process(prepare)
    n_batches = math.ceil(len(cells.cell_ids) / settings.training.per_device_eval_batch_size)
    return CellTypeScorer(cells, data_module.labelled_batches(cells.cell_ids), n_batches, pca_scores, seed)


def select_labelled_cells(source: CellSource, selection: Selection, settings: Settings) -> LabelledCells:
    """Return up to 3,000 validation cells with a label, stratified by label and donor.

    Cells without a label, and those that are the only one of their label, are left out.

    Raises:
        ValueError: a column does not exist, or fewer than two labels have two cells.
    """
    key, donor_key = settings.training.eval_labels, settings.data.donor_key
    batch_key = settings.data.batch_key or donor_key
    require_named_columns({"--eval_labels": key}, source.obs_columns)
    assert key is not None, "the caller checks that labels are wanted"
    columns = list(dict.fromkeys([key, donor_key, batch_key]))
    obs = take_cells(source.obs(columns), selection.parts["validation"])
    obs = obs[has_label(obs[key])]
    labels = fill_missing(obs[key])
    sizes = labels.value_counts()
    repeated = labels.isin(sizes.index[sizes > 1]).to_numpy()
    n_labels = int((sizes > 1).sum())
    if n_labels < 2:
        raise ValueError(
            f"eval_labels: fewer than two values of {key!r} have two validation cells, found {sizes.to_dict()}; choose "
            "another column, or hold out more donors (--validation_fraction)"
        )
    obs = obs[repeated]
    texts = {column: fill_missing(obs[column]).to_numpy(str) for column in (key, donor_key, batch_key)}
    kept = min(KEPT_PER_LABEL, max(2, MAX_CELLS // (2 * n_labels)))
    rows = sample_cells(texts[key], texts[donor_key], MAX_CELLS, settings.training.seed, kept_per_label=kept)
    cell_ids = obs.index.to_numpy(np.int64)[rows]
    return LabelledCells(cell_ids, texts[key][rows], texts[donor_key][rows], texts[batch_key][rows])


def require_scoring(settings: Settings) -> None:
    """Raise unless `eval_labels` can be used: scib-metrics is installed, and the run validates.

    Raises:
        ValueError: names the setting, and what to do.
    """
    if settings.training.eval_labels is None:
        return
    if find_spec("scib_metrics") is None:
        raise ValueError('eval_labels needs scib-metrics, which is not installed: pip install "scgpt_hf[metrics]"')
    if settings.training.eval_strategy == "no":
        raise ValueError("eval_labels has no effect with eval_strategy 'no'; choose epoch or steps, or leave it out")
