"""The objectives of training: each takes tensors and returns one float32 loss.

`ScGPTConfig.loss_weights` selects objectives by these names:

- **gep**, gene expression prediction (`masked_mse`): predict the values of masked genes from their hidden states. The
  main objective of pretraining.
- **gepc**, the same from the cell embedding (`masked_mse`): the cell embedding must summarize the cell. Use it whenever
  cell embeddings are the product.
- **gep_zero**, **gepc_zero** (`bernoulli_nll`): predict whether a gene is expressed at all. Use them with
  `explicit_zero_prob` when genes that are not expressed are tokens too (`include_zeros`).
- **gen**, gene expression generated from the cell embedding (`masked_mse`): a second pass reads the detached cell
  embedding in place of `<cls>`, and predicts the queries of generative training again. For models that generate cells
  from embeddings. Source: bowang-lab/scGPT, branch dev-temp, examples/pretrain.py.
- **ecs**, elastic cell similarity (`elastic_cell_similarity`): separates similar from dissimilar cells. An option for
  fine-tuning on data with clear cell types.
- **cce**, contrastive cell embedding (`contrastive_cells`): two passes of one cell must be closer to each other than to
  other cells. It doubles the forward passes.
- **dar**, domain adaptation by reverse back-propagation (`class_cross_entropy` over domains): removes the experimental
  batch from the cell embedding. For integration of several batches. The head that predicts the domain minimizes the
  cross entropy. `ClassHead` reverses the gradient on the way to the encoder, so the encoder maximizes it and removes
  what identifies the domain. Source: bowang-lab/scGPT:scgpt/model/grad_reverse.py; Ganin and Lempitsky 2015,
  arXiv:1409.7495.
- **cls**, cell type classification (`class_cross_entropy`): over the cells that have a label.
- **views**, contrast of two views (`contrast_views`): a cell must be closer to a second view of itself, with thinned
  counts and other sampled genes, than to other cells of its domain.
- **counts**, the likelihood of the raw counts of all genes given the cell embedding; see `count_decoder_scgpt`.

Every reduction is float32, under any autocast, and returns 0 if there is nothing to reduce. The original divides by
zero there and returns NaN, which ends the training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100.0
"""The label of a position where nothing is predicted; the same as in `packing_scgpt`, which this package cannot import.
"""


def masked_mse(predicted: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Compute the mean squared error over the positions with a label.

    The formula is Σ (predicted − label)² / n over labelled positions. It is the objective of GEP and GEPC.

    Args:
        predicted: predicted values, any shape.
        labels: true values, same shape, `IGNORE` where nothing is predicted.
        num_items: n of the complete batch, when this is one of several parts of it (gradient accumulation, several
            processes). By default the number of labels in this part.

    Source: bowang-lab/scGPT:scgpt/loss.py:5; GEP and GEPC of Cui et al. 2024, Nature Methods 21:1470.
    """
    error = (predicted.float() - labels.float()).square()
    return _mean_where(labels != IGNORE, error, num_items)


def bernoulli_nll(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Compute the mean negative log-likelihood of "the gene is expressed", that is, of a label above 0.

    The formula is the binary cross entropy −log p where the label is above 0 and −log(1 − p) elsewhere, with
    p = sigmoid(logit).

    Args:
        logits: log-odds that the gene is expressed, any shape.
        labels: true values, same shape, `IGNORE` where nothing is predicted.
        num_items: number of labels of the complete batch; see `masked_mse`.

    Source: bowang-lab/scGPT:scgpt/loss.py:16.
    """
    expressed = (labels > 0).float()
    nll = F.binary_cross_entropy_with_logits(logits.float(), expressed, reduction="none")
    return _mean_where(labels != IGNORE, nll, num_items)


def elastic_cell_similarity(cell_embedding: Tensor, threshold: float) -> Tensor:
    """Compute the elastic cell similarity loss (ECS).

    The formula is the mean of 1 − (s − threshold)² over all pairs of cells, where s is their cosine similarity. The
    loss falls when a pair moves away from the threshold: similar cells become more similar, others less. As in the
    original, negative similarities count as 0, and so does the similarity of a cell to itself, which still enters the
    mean.

    Args:
        cell_embedding: shape (cells, hidden).
        threshold: cosine similarity, in [0, 1].

    Source: bowang-lab/scGPT:scgpt/model/model.py:381; ECS of Cui et al. 2024.
    """
    diagonal = torch.eye(len(cell_embedding), dtype=torch.bool, device=cell_embedding.device)
    similarity = _cosine_similarity(cell_embedding, cell_embedding).masked_fill(diagonal, 0.0).relu()
    terms = 1 - (similarity - threshold).square()
    return terms.sum() / max(terms.numel(), 1)


def contrastive_cells(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Compute the contrastive cell embedding loss (CCE).

    Two passes of the same cells with different dropout give two views of each cell. The loss is the cross entropy of
    finding the second view of each cell among those of all cells: −log softmax(s / temperature) at the cell itself,
    where s are the cosine similarities of its first view to all second views.

    Args:
        first: cell embeddings of one pass, shape (cells, hidden).
        second: cell embeddings of another pass, same shape.
        temperature: divisor of the similarities; a lower one emphasises the most similar cells.

    Source: bowang-lab/scGPT:scgpt/model/model.py:366; CCE of Cui et al. 2024, after Gao et al. 2021, arXiv:2104.08821.
    """
    similarity = _cosine_similarity(first, second)
    return class_cross_entropy(similarity / temperature, torch.arange(len(first), device=first.device))


def contrast_views(first: Tensor, second: Tensor, temperature: float, domain_ids: Tensor | None = None) -> Tensor:
    """Compute the contrastive loss of each cell between two views of all cells (InfoNCE), float32 (cells,).

    The formula is −½ (log softmax_j(s_ij / t) + log softmax_j(s_ji / t)) at j = i, where s_ij is the cosine similarity
    of the first view of cell i to the second view of cell j, and t the temperature. The softmax is over the cells of
    the same domain: other domains as negatives would teach what identifies a domain.

    Args:
        first: embeddings of the first views, shape (cells, hidden).
        second: embeddings of the second views, same shape.
        temperature: divisor of the similarities.
        domain_ids: domain of each cell, int64 (cells,); by default all cells are of one domain.

    Source: van den Oord et al. 2018, arXiv:1807.03748; in both directions as in Chen et al. 2020, arXiv:2002.05709.
    """
    logits = _cosine_similarity(first, second) / temperature
    if domain_ids is not None:
        logits = logits.masked_fill(domain_ids[:, None] != domain_ids, -torch.inf)
    itself = torch.arange(len(first), device=first.device)
    there, back = (F.cross_entropy(scores, itself, reduction="none") for scores in (logits, logits.mT))
    return (there + back) / 2


def class_cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Compute the mean cross entropy over the cells with a label.

    Args:
        logits: shape (cells, classes).
        labels: int64 class of each cell, `IGNORE` where unknown, shape (cells,).
        num_items: number of labelled cells of the complete batch; see `masked_mse`.
    """
    known = labels != int(IGNORE)
    nll = F.cross_entropy(logits.float(), labels, ignore_index=int(IGNORE), reduction="none")
    return _mean_where(known, nll, num_items)


def share_of_batch(labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Compute which share of the labels of the complete batch is in this part of it; 1 if it is the complete batch.

    `masked_mse` divides by the labels of the complete batch, so the losses of all parts add up to its mean. Objectives
    over cells have no such divisor. Multiplied by this share, they add up in the same way.

    Args:
        labels: labels of this part, `IGNORE` where nothing is predicted.
        num_items: number of labels of the complete batch, or None.
    """
    if num_items is None:
        return torch.ones((), device=labels.device)
    return _mean_where(labels != IGNORE, torch.ones_like(labels), num_items)


def _mean_where(counted: Tensor, terms: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    n_terms = counted.sum() if num_items is None else torch.as_tensor(num_items, device=terms.device)
    # `masked_fill` and not `terms[counted]`, whose shape depends on data: the CPU would have to wait for the GPU.
    return terms.masked_fill(~counted, 0.0).sum() / n_terms.clamp(min=1)


def _cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compute the similarity of every cell of `first` to every cell of `second`, shape (cells, cells)."""
    with torch.autocast(first.device.type, enabled=False):  # autocast would compute the product in half precision
        return F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).mT
