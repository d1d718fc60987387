"""The input of the encoder: embeddings of genes, values, domains and modalities, and optional norms over their sum.

A *domain* is an experimental batch, such as a donor or an assay.
"""

# PyTorch's modules return Any when called; their outputs here are tensors.
# mypy: disable-error-code="no-any-return"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_scgpt import ScGPTConfig

_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = 6.1e-5, 0.1  # bowang-lab/scGPT:scgpt/model/model.py:96

NOT_PERTURBED, PERTURBED, PADDING = 0, 1, 2  # rows of `FlagEncoder`


def make_value_encoder(config: ScGPTConfig) -> nn.Module | None:
    """Create the module that embeds values, or return None if values multiply the gene embedding instead."""
    if config.value_encoder == "continuous":
        return ContinuousValueEncoder(config)
    if config.value_encoder == "category":
        # Bins are 0 .. n_bins − 1. Row n_bins is for padding, the next one for masked genes, as in
        # bowang-lab/scGPT:scgpt/trainer.py.
        return TableEncoder(config, config.n_value_ids or config.n_bins + 2, padding_idx=config.n_bins)
    return None


def make_input_norm(config: ScGPTConfig) -> nn.Module | None:
    """Create the batch norm over the embedded input, or return None if the config has none."""
    if config.input_norm == "batch":
        return nn.BatchNorm1d(config.hidden_size, eps=_BATCH_NORM_EPS, momentum=_BATCH_NORM_MOMENTUM)
    if config.input_norm == "domain":
        return DomainNorm(config.n_domains, config.hidden_size)
    return None


class TableEncoder(nn.Module):
    """An embedding table followed by a LayerNorm, for genes, binned values and domains."""

    def __init__(self, config: ScGPTConfig, n_rows: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_rows, config.hidden_size, padding_idx)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids of any shape; the result has the hidden axis appended."""
        return self.norm(self.embedding(ids.long()))


class FlagEncoder(nn.Embedding):
    """A vector for what a perturbation does to a token: nothing (0), it targets this gene (1), padding (2).

    At first only row 1 adds anything, so a pretrained encoder starts from what it knows. The original draws all rows
    from normal(0, 1), the default of PyTorch.

    Source: bowang-lab/scGPT:scgpt/model/generation_model.py (`pert_encoder`).
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(3, config.hidden_size, padding_idx=PADDING)


class ModalityTable(nn.Module):
    """The modality of each vocabulary id, which is saved with the weights.

    Attributes:
        of_token: index in `config.modalities` for each vocabulary id, int64 (vocabulary,).
    """

    of_token: Tensor

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.register_buffer("of_token", torch.zeros(config.vocab_size, dtype=torch.int64))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the modality of each token, int64, shaped like `input_ids`."""
        return self.of_token[input_ids]


def make_modality_encoder(config: ScGPTConfig) -> TableEncoder:
    """Create the module that embeds modalities."""
    return TableEncoder(config, len(config.modalities), padding_idx=config.modalities.index("<pad>"))


class ContinuousValueEncoder(nn.Module):
    """A two-layer network that embeds each value as a number; mask and padding values are numbers like all others.

    Source: bowang-lab/scGPT:scgpt/model/model.py (ContinuousValueEncoder).
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.max_value = config.max_value
        self.linear1 = nn.Linear(1, config.hidden_size)
        self.linear2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, values: Tensor) -> Tensor:
        """Embed values of any shape; the result has the hidden axis appended."""
        column = values.clamp(max=self.max_value)[..., None].to(self.linear1.weight.dtype)
        return self.dropout(self.norm(self.linear2(F.relu(self.linear1(column)))))


class DomainNorm(nn.Module):
    """Domain-specific batch normalization: a batch norm without affine parameters and with statistics per domain.

    Each cell is normalized with the statistics of its domain. The original normalizes all cells with those of the first
    cell's domain, which is the same if a batch holds a single domain. Mixed batches need the difference, and shuffled
    data give mixed batches. Padding enters the statistics, as in the original.

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
        """Normalize hidden states.

        Args:
            hidden: shape (cells, tokens, hidden).
            domain_ids: domain of each cell, shape (cells,).
        """
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._update_statistics(hidden.float(), domain_ids)
        mean, var = mean[domain_ids][:, None], var[domain_ids][:, None]  # (cells, 1, hidden)
        return ((hidden - mean) * torch.rsqrt(var + _BATCH_NORM_EPS)).to(hidden.dtype)

    def _update_statistics(self, hidden: Tensor, domain_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Update the running statistics and return the batch's mean and biased variance, each (domains, hidden)."""
        # A matrix product with the membership of cells in domains computes all domains at once. A loop over the domains
        # that occur would make the CPU wait for the GPU to learn which ones do.
        member = F.one_hot(domain_ids, len(self.running_mean)).to(hidden.dtype)  # (cells, domains)
        n_values = member.sum(0)[:, None] * hidden.shape[1]
        mean = member.mT @ hidden.sum(1) / n_values.clamp(min=1)
        var = member.mT @ (hidden - mean[domain_ids][:, None]).square().sum(1) / n_values.clamp(min=1)
        with torch.no_grad():
            share = _BATCH_NORM_MOMENTUM * (n_values > 0)  # domains that do not occur keep their statistics
            self.running_mean.lerp_(mean, share.expand_as(mean))
            # The running variance is unbiased, the one of the batch is not, as in nn.BatchNorm1d.
            self.running_var.lerp_(var * n_values / (n_values - 1).clamp(min=1), share.expand_as(var))
            self.num_batches_tracked += n_values[:, 0] > 0
        return mean, var
