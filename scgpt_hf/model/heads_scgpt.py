"""What is read from hidden states: expression, cell class and domain.

Heads see flat tensors, one row per token or cell they predict, and never ask which layout those came from.
"""

# PyTorch's modules return Any when called; their outputs here are tensors.
# mypy: disable-error-code="no-any-return"

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from .configuration_scgpt import ScGPTConfig

_QUERY_WIDTH = 64  # of the concat query, and of the hidden layer after both; bowang-lab/scGPT:scgpt/model/model.py:860
_DISCRIMINATOR_LAYERS = 3  # bowang-lab/scGPT:scgpt/model/model.py:957


@dataclass
class ScGPTForPreTrainingOutput(ModelOutput):
    """What pretraining returns.

    Predictions of expression are (masked,) where `label_positions` was given, else shaped like `input_ids`.

    Args:
        loss: weighted sum of `losses`.
        losses: each objective by name, unweighted; given `num_items_in_batch`, this part's share of the batch's mean.
        gep: expression predicted from each token's hidden state.
        gepc: expression predicted from the cell's embedding.
        gep_zero: log-odds that the gene is expressed, from the hidden state.
        gepc_zero: log-odds that the gene is expressed, from the cell's embedding.
        dar: logits of each cell's domain, (cells, domains).
        class_logits: logits of each cell's class, (cells, classes).
        cell_embedding: of every cell, (cells, hidden).
        last_hidden_state: of every token, (cells, tokens, hidden).
        hidden_states: input of the first layer and output of each, if asked for.
        attentions: attention probabilities of each layer, if asked for and eager.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    gep: Tensor | None = None
    gepc: Tensor | None = None
    gep_zero: Tensor | None = None
    gepc_zero: Tensor | None = None
    dar: Tensor | None = None
    class_logits: Tensor | None = None
    cell_embedding: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


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
            cell_embedding: of each token's cell, its domain appended where the config says so.
            gene_embedding: of each token's gene, (tokens, hidden).
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

    def __init__(self, config: ScGPTConfig, n_classes: int | None, *, adversarial: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.adversarial = adversarial
        n_layers = _DISCRIMINATOR_LAYERS if adversarial else config.class_head_layers
        activation = nn.LeakyReLU if adversarial else nn.ReLU
        blocks = [(nn.Linear(width, width), activation(), nn.LayerNorm(width)) for _ in range(n_layers - 1)]
        self.layers = nn.Sequential(*(layer for block in blocks for layer in block))
        self.out = nn.Linear(width, n_classes or 0)

    def forward(self, cell_embedding: Tensor) -> Tensor:
        """Return logits, (cells, classes), of embeddings (cells, hidden)."""
        if self.adversarial:
            cell_embedding = 2 * cell_embedding.detach() - cell_embedding  # the same value, its gradient reversed
        return self.out(self.layers(cell_embedding))


def _three_layers(config: ScGPTConfig) -> nn.Sequential:
    width = config.hidden_size
    hidden = [
        nn.Linear(width * (1 + config.domain_embedding), width),
        nn.LeakyReLU(),
        nn.Linear(width, width),
        nn.LeakyReLU(),
    ]
    return nn.Sequential(*hidden, nn.Linear(width, 1))
