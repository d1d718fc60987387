"""The count decoder: predict the raw counts of every gene of a cell from its embedding, zeros included.

Masked objectives (GEP, GEPC) only see genes that a cell expresses. This objective explains the complete count vector,
so the cell embedding must also encode which genes are *not* expressed. A bias for each gene and experimental batch
belongs to the decoder: the encoder never sees it, so the embedding need not carry batch effects.
"""

# PyTorch's modules return Any when called; their outputs here are tensors.
# mypy: disable-error-code="no-any-return"

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .configuration_scgpt import ScGPTConfig

MAX_COUNT = 50.0
"""Larger counts are clamped to this, so that a few genes such as MALAT1 do not dominate the loss."""

MAX_LOGITS = 2**22
"""Logits of the multinomial that are computed at a time: 16 MB in float32. More are computed in chunks of genes."""

_LOSS_SCALE = 1 / 100
"""Brings the negative log-likelihood of a cell, a few hundred nats, to the scale of the other objectives."""


class CountHead(nn.Module):
    """Predict the log-abundance of every gene from a cell's embedding and its experimental batch.

    `logits = W₂ · relu(W₁ z + b[domain]) + bias[domain]`, where `z` is the cell embedding. Genes that the domain's data
    set did not measure are excluded from the likelihood by `measured`.

    Attributes:
        bias: log-abundance of each gene in each domain, (domains, genes). `set_statistics` initializes it from data.
        measured: whether the domain's data set measured the gene, bool (domains, genes).

    Source: a decoder with batch-specific bias as in scVI, Lopez et al. 2018, Nature Methods 15:1053; multinomial
        instead of negative binomial counts by default, which our measurements found as good and faster.
    """

    measured: Tensor

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        n_domains, size = max(config.n_domains, 1), config.count_head_size
        self.hidden = nn.Linear(config.hidden_size, size)
        self.domain_hidden = nn.Parameter(torch.zeros(n_domains, size))
        self.out = nn.Linear(size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_domains, config.vocab_size))
        self.register_buffer("measured", torch.ones(n_domains, config.vocab_size, dtype=torch.bool))
        nb = config.count_likelihood == "nb"
        self.log_dispersion = nn.Parameter(torch.zeros(config.vocab_size)) if nb else None

    @torch.no_grad()
    def set_statistics(self, totals: Tensor, measured: Tensor | None = None) -> None:
        """Initialize the bias and the mask of measured genes from the training cells.

        The bias of a gene is the log of its share of the domain's counts. A measured gene without a count gets its
        share of all counts times the weight of a single count, as if the domain had one count more.

        Args:
            totals: sum of the counts of each gene in each domain, (domains, genes). A domain without any counts, which
                only validation cells have, gets the frequencies and the measured genes of all domains together.
            measured: the genes that the data sets of a domain measured, bool (domains, genes), if they are known. Genes
                with counts are measured in any case; by default no others are.

        Raises:
            ValueError: there are no counts at all.
        """
        totals = totals.to(self.bias.device, torch.float64)
        of_all = totals.sum(0, keepdim=True)
        if not bool(of_all.sum() > 0):
            raise ValueError("expected the counts of the training cells, found none; choose other cells or genes")
        has_counts = totals.sum(1, keepdim=True) > 0
        known = totals > 0 if measured is None else measured.to(totals.device) | (totals > 0)
        self.measured.copy_(torch.where(has_counts, known, known.any(0, keepdim=True)))
        totals = torch.where(has_counts, totals, of_all)
        n_counts = totals.sum(1, keepdim=True)
        frequency = torch.where(totals > 0, totals / n_counts, of_all / of_all.sum() / (n_counts + 1))
        self.bias.copy_(frequency.clamp(min=1e-12).log().to(self.bias.dtype))

    def forward(self, cell_embedding: Tensor, domain_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return logits, float32 (cells, genes), and which genes count, bool (cells, genes)."""
        domain_ids = _or_zeros(domain_ids, cell_embedding)
        hidden = self._embed(cell_embedding, domain_ids)
        return _logits(hidden, self.out.weight, self.bias, domain_ids), self.measured[domain_ids]

    def loss(
        self, cell_embedding: Tensor, domain_ids: Tensor | None, ids: Tensor, counts: Tensor, cells: Tensor
    ) -> Tensor:
        """Return the negative log-likelihood of the counts of each cell, float32 (cells,).

        Args:
            cell_embedding: (cells, hidden).
            domain_ids: experimental batch of each cell, int64 (cells,); None if there is only one.
            ids: vocabulary id of each expressed gene of all cells, end to end, int64 (entries,).
            counts: its raw count, > 0, float32 (entries,).
            cells: the cell it belongs to, int64 (entries,).
        """
        domain_ids = _or_zeros(domain_ids, cell_embedding)
        counts = counts.float().clamp(max=MAX_COUNT)
        counts = counts * self.measured[domain_ids[cells], ids]  # a gene that is not measured has no likelihood
        if self.log_dispersion is not None:
            logits, measured = self(cell_embedding, domain_ids)
            dispersion = self.log_dispersion.float()
            return negative_binomial_nll(logits, measured, dispersion, ids, counts, cells) * _LOSS_SCALE
        hidden = self._embed(cell_embedding, domain_ids)
        tables = (self.out.weight, self.bias, self.measured)
        n_genes = max(MAX_LOGITS // len(cell_embedding), 1)
        return multinomial_nll(hidden, domain_ids, *tables, CountEntries(ids, counts, cells), n_genes) * _LOSS_SCALE

    def _embed(self, cell_embedding: Tensor, domain_ids: Tensor) -> Tensor:
        """Return the hidden layer, (cells, size)."""
        # `embedding` instead of an index: the gradient of an index adds in no fixed order on several CPU threads.
        return F.relu(
            self.hidden(cell_embedding) + F.embedding(domain_ids, self.domain_hidden).to(cell_embedding.dtype)
        )


class CountEntries(NamedTuple):
    """Non-zero counts of all cells, end to end.

    Attributes:
        ids: gene of each count, int64 (entries,).
        counts: the counts, 0 for genes that do not take part, float (entries,).
        cells: cell of each count, ascending, int64 (entries,).
    """

    ids: Tensor
    counts: Tensor
    cells: Tensor


def multinomial_nll(
    hidden: Tensor,
    domain_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    measured: Tensor,
    entries: CountEntries,
    n_genes: int,
) -> Tensor:
    """Return −Σ_g c_g · log softmax(weight · hidden + bias)_g of each cell over its measured genes, (cells,).

    The multinomial coefficient does not depend on the model and is left out. With several chunks of genes, memory holds
    the logits of one chunk at a time: they are computed again for the gradient. The result is the same.

    Args:
        hidden: (cells, size).
        domain_ids: row of `bias` and `measured` of each cell, (cells,).
        weight: (genes, size).
        bias: (domains, genes).
        measured: which genes take part, (domains, genes).
        entries: the counts.
        n_genes: genes of a chunk.
    """
    split = torch.functional.split
    chunks = list(zip(split(weight, n_genes), split(bias, n_genes, 1), split(measured, n_genes, 1), strict=True))
    parts = []
    for chunk, tables in enumerate(chunks):
        arguments = (hidden, domain_ids, *tables, entries._replace(ids=entries.ids - chunk * n_genes))
        if len(chunks) == 1:
            parts.append(_normalizer_and_score(*arguments))
        else:
            parts.append(checkpoint(_normalizer_and_score, *arguments, use_reentrant=False, preserve_rng_state=False))
    normalizers, scores = (torch.stack(terms) for terms in zip(*parts, strict=True))  # (chunks, cells)
    totals = _sum_by_cell(entries.counts, entries.cells, len(hidden))
    return totals * normalizers.logsumexp(dim=0) - scores.sum(dim=0)


def _normalizer_and_score(
    hidden: Tensor, domain_ids: Tensor, weight: Tensor, bias: Tensor, measured: Tensor, entries: CountEntries
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of the logits of some genes, and Σ_g c_g · logit_g over these genes; (cells,) each.

    Arguments as for `multinomial_nll`. Entries of other genes have ids outside of 0 … genes - 1.
    """
    ids, counts, cells = entries
    logits = _logits(hidden, weight, bias, domain_ids)
    normalizer = logits.masked_fill(~measured[domain_ids], -torch.inf).logsumexp(dim=1)
    counts = counts * ((ids >= 0) & (ids < len(weight)))
    return normalizer, _sum_by_cell(counts * logits[cells, ids.clamp(0, len(weight) - 1)], cells, len(hidden))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, domain_ids: Tensor) -> Tensor:
    """Return the logits of some genes in float32 or more, (cells, genes)."""
    dtype = torch.promote_types(bias.dtype, torch.float32)
    return F.linear(hidden, weight).to(dtype) + F.embedding(domain_ids, bias).to(dtype)


def _or_zeros(domain_ids: Tensor | None, cell_embedding: Tensor) -> Tensor:
    """Return the domain of each cell, (cells,): the only one if none are given."""
    if domain_ids is not None:
        return domain_ids
    return torch.zeros(len(cell_embedding), dtype=torch.long, device=cell_embedding.device)


def negative_binomial_nll(
    logits: Tensor, measured: Tensor, log_dispersion: Tensor, ids: Tensor, counts: Tensor, cells: Tensor
) -> Tensor:
    """Return the negative log-likelihood of negative binomial counts of each cell over its measured genes, (cells,).

    The mean of gene g is the cell's total times softmax(logits)_g; the variance is mean + mean² / dispersion.

    Args:
        logits: (cells, genes).
        measured: which genes take part, (cells, genes).
        log_dispersion: log of each gene's inverse over-dispersion, (genes,).
        ids: gene of each non-zero count, (entries,).
        counts: the counts, 0 for genes that do not take part, (entries,).
        cells: cell of each count, (entries,).

    Source: Lopez et al. 2018, Nature Methods 15:1053.
    """
    n_cells = len(logits)
    totals = _sum_by_cell(counts, cells, n_cells)
    log_mean = logits.masked_fill(~measured, -torch.inf).log_softmax(dim=1) + totals.clamp(min=1e-8).log()[:, None]
    dispersion = log_dispersion.exp()
    log_sum = torch.logaddexp(log_dispersion.expand_as(log_mean), log_mean)  # log(dispersion + mean)
    # Of a zero count: dispersion · (log(dispersion + mean) − log dispersion).
    zeros = (dispersion * (log_sum - log_dispersion)).masked_fill(~measured, 0.0).sum(dim=1)
    at, r = (cells, ids), F.embedding(ids, dispersion[:, None]).squeeze(1)
    # What a count adds to the zero's term.
    more = counts * (log_sum[at] - log_mean[at].clamp(min=-1e4))
    more = more + torch.lgamma(counts + 1) + torch.lgamma(r) - torch.lgamma(counts + r)
    return zeros + _sum_by_cell(more.masked_fill(counts == 0, 0.0), cells, n_cells)


def _sum_by_cell(terms: Tensor, cells: Tensor, n_cells: int) -> Tensor:
    """Return the sum of each cell's terms, given that `cells` ascends.

    A bag of one-dimensional vectors: unlike `index_add` it adds in a fixed order on a GPU, and unlike `bincount` it has
    no shape that depends on the data.
    """
    offsets = torch.searchsorted(cells, torch.arange(n_cells, device=cells.device))
    rows = torch.arange(len(terms), device=terms.device)
    return F.embedding_bag(rows, terms[:, None], offsets, mode="sum").squeeze(1)
