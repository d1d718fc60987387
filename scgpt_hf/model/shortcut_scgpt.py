"""A shortcut by which the identity of all genes reaches `<cls>` directly.

Without it, `<cls>` learns which genes a cell expresses only through attention, which takes many steps. The shortcut
adds a learned function of the expression-weighted sum of gene vectors to `<cls>`, before and after the encoder. It is
the encoder of a simple bag-of-genes network, so the model contains that network.
"""

# PyTorch's modules return Any when called; their outputs here are tensors.
# mypy: disable-error-code="no-any-return"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_scgpt import ScGPTConfig

STATE_WEIGHT = 0.1
"""Initial weight of the encoder's state at `<cls>` beside the shortcut: attention starts as a small correction."""


class CellShortcut(nn.Module):
    """Embed each cell as `MLP(Σ v[g] B[g])`, the sum over its visible genes of value times gene vector.

    `MLP` is LayerNorm, ReLU, Linear, LayerNorm, ReLU, Linear. Masked genes, `<cls>` and padding carry values ≤ 0 and
    have no weight.

    Source: a deep averaging network, Iyyer et al. 2015, doi:10.3115/v1/P15-1162; sizes and the position of the norms
        are from our own measurements.
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        size, eps = config.shortcut_size, config.layer_norm_eps
        self.genes = nn.Embedding(config.vocab_size, size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size, eps),
            nn.ReLU(),
            nn.Linear(size, size),
            nn.LayerNorm(size, eps),
            nn.ReLU(),
            nn.Linear(size, config.hidden_size),
        )
        self.state_weight = nn.Parameter(torch.tensor(STATE_WEIGHT))

    def forward(self, input_ids: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        """Return one vector per cell, (cells, hidden).

        Args:
            input_ids: vocabulary ids, packed or padded.
            values: what the model reads of each gene, same shape.
            offsets: offsets of the cells in the flattened input, (cells + 1,).
        """
        table = self.genes.weight
        weights = values.flatten().to(table.dtype).relu()
        # A bag is summed without a (tokens, size) intermediate. The last bag also holds what follows the last cell of a
        # bucketed row: padding, whose weight is 0.
        starts = offsets[:-1].long()
        bags = F.embedding_bag(input_ids.flatten(), table, starts, mode="sum", per_sample_weights=weights)
        return self.mlp(bags)
