"""What goes into the encoder: genes, values and domains as vectors, and the batch norms over their sum."""

# PyTorch's modules return Any when called; their outputs here are tensors.
# mypy: disable-error-code="no-any-return"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_scgpt import ScGPTConfig

_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = 6.1e-5, 0.1  # bowang-lab/scGPT:scgpt/model/model.py:96


def value_encoder_of(config: ScGPTConfig) -> nn.Module | None:
    """Return the module that turns values into vectors; None where values scale the gene embedding."""
    if config.value_encoder == "continuous":
        return ContinuousValueEncoder(config)
    if config.value_encoder == "category":
        # The bin after the last marks padding, the one after that the hidden value; bowang-lab/scGPT:scgpt/trainer.py.
        return TableEncoder(config, config.n_value_ids or config.n_bins + 2, padding_idx=config.n_bins)
    return None


def input_norm_of(config: ScGPTConfig) -> nn.Module | None:
    """Return the batch norm over the embedded input that the config asks for, if any."""
    if config.input_norm == "batch":
        return nn.BatchNorm1d(config.hidden_size, eps=_BATCH_NORM_EPS, momentum=_BATCH_NORM_MOMENTUM)
    if config.input_norm == "domain":
        return DomainNorm(config.n_domains, config.hidden_size)
    return None


class TableEncoder(nn.Module):
    """Looks a whole number up in a table and normalises the row: genes, binned values, domains."""

    def __init__(self, config: ScGPTConfig, n_rows: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_rows, config.hidden_size, padding_idx)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Return one embedding per id."""
        return self.norm(self.embedding(ids.long()))


class ContinuousValueEncoder(nn.Module):
    """Turns each value into a vector; mask and padding values go through it like any other number."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.max_value = config.max_value
        self.linear1 = nn.Linear(1, config.hidden_size)
        self.linear2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, values: Tensor) -> Tensor:
        """Return one embedding per value."""
        column = values.clamp(max=self.max_value)[..., None].to(self.linear1.weight.dtype)
        return self.dropout(self.norm(self.linear2(F.relu(self.linear1(column)))))


class DomainNorm(nn.Module):
    """Batch norm without affine parameters that keeps one set of statistics per domain (DSBN).

    Each cell is normalised by its own domain; the original normalises all by the first cell's, which is the same where
    a batch holds one domain. Padding counts, as there.

    Source: bowang-lab/scGPT:scgpt/model/dsbn.py; Chang et al. 2019, arXiv:1906.03950.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, n_domains: int, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(n_domains, width))
        self.register_buffer("running_var", torch.ones(n_domains, width))
        self.register_buffer("num_batches_tracked", torch.zeros(n_domains, dtype=torch.int64))

    def forward(self, hidden: Tensor, domain_ids: Tensor) -> Tensor:
        """Return hidden states, (cells, tokens, hidden), normalised by each cell's entry in `domain_ids`, (cells,)."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._batch_statistics(hidden.float(), domain_ids)
        mean, var = mean[domain_ids][:, None], var[domain_ids][:, None]  # (cells, 1, hidden)
        return ((hidden - mean) * torch.rsqrt(var + _BATCH_NORM_EPS)).to(hidden.dtype)

    def _batch_statistics(self, hidden: Tensor, domain_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each domain, (domains, hidden), having updated the running ones."""
        member = F.one_hot(domain_ids, len(self.running_mean)).to(hidden.dtype)  # (cells, domains)
        n_values = member.sum(0)[:, None] * hidden.shape[1]
        mean = member.mT @ hidden.sum(1) / n_values.clamp(min=1)
        var = member.mT @ (hidden - mean[domain_ids][:, None]).square().sum(1) / n_values.clamp(min=1)
        with torch.no_grad():
            share = _BATCH_NORM_MOMENTUM * (n_values > 0)
            self.running_mean.lerp_(mean, share.expand_as(mean))
            self.running_var.lerp_(var * n_values / (n_values - 1).clamp(min=1), share.expand_as(var))
            self.num_batches_tracked += n_values[:, 0] > 0
        return mean, var
