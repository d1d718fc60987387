"""What is read from hidden states: expression, cell class and domain; and the batch norm that knows domains.

Heads see flat tensors, one row per token or cell they predict, and never ask which layout those came from.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_scgpt import ScGPTConfig

_QUERY_WIDTH = 64  # of the concat query and the hidden layer of the concat and sum styles; bowang-lab/scGPT:scgpt/model/model.py:860


class ExpressionHead(nn.Module):
    """Predicts a token's value from its hidden state (GEP), and whether the gene is expressed at all.

    Source: bowang-lab/scGPT:scgpt/model/model.py:769 (ExprDecoder).
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.value = _three_layers(config)
        self.zero = _three_layers(config) if config.explicit_zero_prob else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the value and, with explicit zeros, the log-odds of being expressed: both (tokens,)."""
        zero = None if self.zero is None else self.zero(hidden).squeeze(-1)
        return self.value(hidden).squeeze(-1), zero


class CellToGeneHead(nn.Module):
    """Predicts a gene's value in a cell from the cell's embedding (GEPC).

    Source: bowang-lab/scGPT:scgpt/model/model.py:820 (MVCDecoder).
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        width, cell_width = config.hidden_size, config.hidden_size * (1 + config.domain_embedding)
        self.style, self.detach = config.gepc_query, config.gepc_detach
        self.query = nn.Linear(width, _QUERY_WIDTH if self.style == "concat" else width)
        self.project, self.project_zero = None, None
        if self.style == "inner_product":
            self.project = nn.Linear(width, cell_width, bias=False)
            self.project_zero = nn.Linear(width, cell_width) if config.explicit_zero_prob else None
        else:
            self.hidden = nn.Linear(width + _QUERY_WIDTH * (self.style == "concat"), _QUERY_WIDTH)
            self.activation = nn.PReLU()
            self.value = nn.Linear(_QUERY_WIDTH, 1)

    def forward(self, cell_embedding: Tensor, gene_embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the value and, with explicit zeros, the log-odds of being expressed: both (tokens,).

        Args:
            cell_embedding: of each token's cell, domain appended where the config says so. (tokens, hidden or 2 hidden).
            gene_embedding: of each token's gene. (tokens, hidden).
        """
        query = torch.sigmoid(self.query(gene_embedding.detach() if self.detach else gene_embedding))
        if self.project is not None:
            zero = None if self.project_zero is None else (self.project_zero(query) * cell_embedding).sum(-1)
            return (self.project(query) * cell_embedding).sum(-1), zero
        met = torch.cat([cell_embedding, query], dim=-1) if self.style == "concat" else cell_embedding + query
        return self.value(self.activation(self.hidden(met))).squeeze(-1), None


class ClassHead(nn.Module):
    """Predicts one logit per class from a cell's embedding; as discriminator, with its input's gradient reversed.

    Source: bowang-lab/scGPT:scgpt/model/model.py:910 (ClsDecoder) and :949 (AdversarialDiscriminator).
    """

    def __init__(self, config: ScGPTConfig, n_classes: int, n_layers: int, *, adversarial: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.adversarial = adversarial
        activation = nn.LeakyReLU if adversarial else nn.ReLU
        blocks = [(nn.Linear(width, width), activation(), nn.LayerNorm(width)) for _ in range(n_layers - 1)]
        self.layers = nn.Sequential(*(layer for block in blocks for layer in block))
        self.out = nn.Linear(width, n_classes)

    def forward(self, cell_embedding: Tensor) -> Tensor:
        """Return logits, (cells, classes), of embeddings (cells, hidden)."""
        if self.adversarial:
            cell_embedding = ReverseGradient.apply(cell_embedding)
        return self.out(self.layers(cell_embedding))


class ReverseGradient(torch.autograd.Function):
    """Passes its input on unchanged, and its gradient on negated."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        """Return the input."""
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient, negated."""
        return gradient.neg()


class DomainNorm(nn.Module):
    """Batch norm without affine parameters that keeps one set of statistics per domain (DSBN).

    Each cell is normalised by its own domain; the original takes the domain of the first cell for all, which is the same
    where a batch holds one domain. Padding counts, as there.

    Source: bowang-lab/scGPT:scgpt/model/dsbn.py; Chang et al. 2019, arXiv:1906.03950.
    """

    def __init__(self, n_domains: int, width: int, *, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(n_domains, width))
        self.register_buffer("running_var", torch.ones(n_domains, width))
        self.register_buffer("num_batches_tracked", torch.zeros(n_domains, dtype=torch.int64))

    def forward(self, hidden: Tensor, domain_ids: Tensor) -> Tensor:
        """Return normalised hidden states, (cells, tokens, hidden), of cells whose domains are `domain_ids` (cells,)."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._batch_statistics(hidden.float(), domain_ids)
        mean, var = mean[domain_ids][:, None], var[domain_ids][:, None]  # (cells, 1, hidden)
        return ((hidden - mean) * torch.rsqrt(var + self.eps)).to(hidden.dtype)

    def _batch_statistics(self, hidden: Tensor, domain_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each domain, (domains, hidden), having updated the running ones."""
        member = F.one_hot(domain_ids, len(self.running_mean)).to(hidden.dtype)  # (cells, domains)
        n_values = member.sum(0)[:, None] * hidden.shape[1]
        mean = member.mT @ hidden.sum(1) / n_values.clamp(min=1)
        var = member.mT @ (hidden - mean[domain_ids][:, None]).square().sum(1) / n_values.clamp(min=1)
        with torch.no_grad():
            share = self.momentum * (n_values > 0)
            self.running_mean.lerp_(mean, share.expand_as(mean))
            self.running_var.lerp_(var * n_values / (n_values - 1).clamp(min=1), share.expand_as(var))
            self.num_batches_tracked += n_values[:, 0] > 0
        return mean, var


def _three_layers(config: ScGPTConfig) -> nn.Sequential:
    width = config.hidden_size
    hidden = [
        nn.Linear(width * (1 + config.domain_embedding), width),
        nn.LeakyReLU(),
        nn.Linear(width, width),
        nn.LeakyReLU(),
    ]
    return nn.Sequential(*hidden, nn.Linear(width, 1))
