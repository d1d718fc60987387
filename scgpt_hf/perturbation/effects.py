"""Run a perturbation model: predict control cells after a perturbation, and the mean effect of a condition."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import Float64Array, Int64Array
from scgpt_hf.inference import evaluation_mode, move_batch
from scgpt_hf.perturbation.batches import Example, Values, make_batch
from scgpt_hf.perturbation.gene_names import ScreenGenes
from scgpt_hf.perturbation.pseudobulk import Names
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


@torch.inference_mode()
def predict_cells(
    model: Any,
    processor: ScGPTProcessor,
    values: csr_matrix,
    genes: ScreenGenes,
    rows: Int64Array,
    targets: Int64Array,
    *,
    batch_size: int = 16,
) -> Values:
    """Return control cells as they are after a perturbation.

    Args:
        model: a `ScGPTForPerturbation`; it runs on the device where it is.
        processor: its processor.
        values: log1p values of the cells of a screen. Shape (cells, genes).
        genes: how the genes of the screen relate to the vocabulary.
        rows: the control cells. Shape (n,).
        targets: vocabulary ids of the perturbed genes.
        batch_size: cells per batch; changes speed, not the result.

    Returns:
        log1p values; genes that the model does not know keep their value. Shape (n, genes).
    """
    found: Values = values[rows].toarray().astype(np.float32)
    with evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            part = slice(start, min(start + batch_size, len(rows)))
            examples = [Example(cell[genes.columns], targets) for cell in found[part]]
            batch, places = make_batch(examples, genes.ids, processor, model.config)
            predicted = model(**move_batch(batch, model.device)).expression.float().cpu().numpy().ravel()
            for row, place in zip(range(part.start, part.stop), places, strict=True):
                found[row, genes.columns] = predicted[place]
    return found


def predict_effect(
    model: Any,
    processor: ScGPTProcessor,
    values: csr_matrix,
    genes: ScreenGenes,
    rows: Int64Array,
    targets: Int64Array,
) -> Float64Array:
    """Return the mean difference that a perturbation makes to some control cells. Shape (genes,).

    The arguments are those of `predict_cells`.
    """
    predicted = predict_cells(model, processor, values, genes, rows, targets)
    before = np.asarray(values[rows].mean(axis=0, dtype=np.float64)).ravel()
    effect: Float64Array = predicted.mean(axis=0, dtype=np.float64) - before
    return effect


def spread_over_batches(controls: Int64Array, batches: Names, n: int, seed: int) -> Int64Array:
    """Return up to `n` control cells, the same share of every batch as far as it has them.

    Args:
        controls: the control cells.
        batches: batch of each cell of the screen.
        n: number of cells.
        seed: seed of the choice.
    """
    rng = np.random.default_rng(seed)
    labels = batches[controls]
    # The position of a cell within its own shuffled batch: cells of small positions come from all batches.
    position = np.empty(len(controls), np.int64)
    for batch in np.unique(labels):
        members = np.flatnonzero(labels == batch)
        position[members] = rng.permutation(len(members))
    chosen: Int64Array = np.sort(controls[np.argsort(position, kind="stable")[:n]])
    return chosen
