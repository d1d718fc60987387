"""The objectives a model is trained on, and the error it is read by: tensors in, one float32 scalar out.

Every reduction is float32 under any autocast and has a defined value, 0, when there is nothing to reduce. Which
objectives are added, and with which weights, is decided by `ScGPTConfig.loss_weights`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100.0
"""The label where there is nothing to predict."""


def masked_mse(predicted: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return the mean squared error over the positions that have a label.

    Args:
        predicted: predicted values, any shape.
        labels: true values, same shape, `IGNORE` where there is nothing to predict.
        num_items: what to divide the sum by, when this is a part of a larger batch; by default the labels present.

    Source: bowang-lab/scGPT:scgpt/loss.py:5; GEP and GEPC of Cui et al. 2024, Nature Methods 21:1470.
    """
    error = (predicted.float() - labels.float()).square()
    return _mean_where(labels != IGNORE, error, num_items)


def masked_relative_error(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of |error| / (label + 1e-6) over the positions that have a label: a metric, not an objective.

    A label of 0 counts a million times its error; mask expressed genes only.

    Source: bowang-lab/scGPT:scgpt/loss.py:26.
    """
    error = (predicted.float() - labels.float()).abs() / (labels.float() + 1e-6)
    return _mean_where(labels != IGNORE, error)


def bernoulli_nll(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return the mean negative log-likelihood of "this gene is expressed", a label above 0.

    Args:
        logits: log-odds that the gene is expressed, any shape.
        labels: true values, same shape, `IGNORE` where there is nothing to predict.
        num_items: what to divide the sum by, as in `masked_mse`.

    Source: bowang-lab/scGPT:scgpt/loss.py:16.
    """
    expressed = (labels > 0).float()
    nll = F.binary_cross_entropy_with_logits(logits.float(), expressed, reduction="none")
    return _mean_where(labels != IGNORE, nll, num_items)


def elastic_cell_similarity(cell_embedding: Tensor, threshold: float) -> Tensor:
    """Return how far the similarities between cells are from being clearly above or below the threshold.

    Negative similarities count as 0, and so does a cell's with itself, which still enters the mean.

    Args:
        cell_embedding: (cells, hidden).
        threshold: cosine similarity, in [0, 1].

    Source: bowang-lab/scGPT:scgpt/model/model.py:381; ECS of Cui et al. 2024.
    """
    diagonal = torch.eye(len(cell_embedding), dtype=torch.bool, device=cell_embedding.device)
    similarity = _cosine_similarity(cell_embedding, cell_embedding).masked_fill(diagonal, 0.0).relu()
    terms = 1 - (similarity - threshold).square()
    return terms.sum() / max(terms.numel(), 1)


def contrastive_cells(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the cross entropy of finding each cell's second view among the second views of all cells.

    Args:
        first: cell embeddings of one pass, (cells, hidden).
        second: of another pass with other dropout, same shape.
        temperature: what cosine similarities are divided by.

    Source: bowang-lab/scGPT:scgpt/model/model.py:366; CCE of Cui et al. 2024, after Gao et al. 2021, arXiv:2104.08821.
    """
    similarity = _cosine_similarity(first, second)
    return class_cross_entropy(similarity / temperature, torch.arange(len(first), device=first.device))


def class_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of (cells, classes) logits over the cells whose int64 label is not `IGNORE`."""
    known = labels != int(IGNORE)
    nll = F.cross_entropy(logits.float(), labels, ignore_index=int(IGNORE), reduction="none")
    return _mean_where(known, nll)


def domain_cross_entropy(logits: Tensor, domain_ids: Tensor) -> Tensor:
    """Return the cross entropy of guessing each cell's domain; the encoder gets its gradient reversed (DAR).

    Source: bowang-lab/scGPT:scgpt/model/grad_reverse.py; Ganin and Lempitsky 2015, arXiv:1409.7495.
    """
    return class_cross_entropy(logits, domain_ids)


def share_of_batch(labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Return the share of a batch's labels that is in this part of it; 1 when there is no larger batch.

    Objectives over cells are weighted by it, so that parts of a batch add up to one mean.
    """
    if num_items is None:
        return torch.ones((), device=labels.device)
    return _mean_where(labels != IGNORE, torch.ones_like(labels), num_items)


def _mean_where(counted: Tensor, terms: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    n_terms = counted.sum() if num_items is None else torch.as_tensor(num_items, device=terms.device)
    return terms.masked_fill(~counted, 0.0).sum() / n_terms.clamp(min=1)


def _cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the similarity of every cell of one with every cell of the other, (cells, cells)."""
    with torch.autocast(first.device.type, enabled=False):  # which would take the product in half precision
        return F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).mT
