"""The heads: predict expression, the class of a cell or its domain from what the encoder returns.

Heads read flat tensors with one row per token or cell. They do not depend on whether the input was padded or packed.
"""

# PyTorch's modules return Any when called; their outputs here are tensors.
# mypy: disable-error-code="no-any-return"

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from .configuration_scgpt import ScGPTConfig

_QUERY_WIDTH = 64  # of the "concat" query, and of the hidden layer; bowang-lab/scGPT:scgpt/model/model.py:860
_DISCRIMINATOR_LAYERS = 3  # bowang-lab/scGPT:scgpt/model/model.py:957


@dataclass
class ScGPTForPreTrainingOutput(ModelOutput):
    """The output of `ScGPTForPreTraining`.

    Predictions of expression have shape (masked,) if `label_positions` or `label_ids` was passed, and the shape of
    `input_ids` otherwise.

    Args:
        loss: weighted sum of `losses`.
        losses: each objective by name, without its weight. If `num_items_in_batch` was passed, this part's share of the
            batch's mean.
        gep: expression predicted from each token's hidden state.
        gepc: expression predicted from the cell embedding.
        gep_zero: log-odds that the gene is expressed, from the hidden state.
        gepc_zero: log-odds that the gene is expressed, from the cell embedding.
        dar: logits of each cell's domain, (cells, domains).
        class_logits: logits of each cell's class, (cells, classes).
        cell_embedding: embedding of every cell, (cells, hidden).
        last_hidden_state: hidden state of every token, (cells, tokens, hidden).
        hidden_states: input of the first layer and output of each layer, if requested.
        attentions: attention probabilities of each layer, if requested and attention is eager.
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


@dataclass
class ScGPTForPerturbationOutput(ModelOutput):
    """The output of `ScGPTForPerturbation`. Predictions have the shape of `input_ids`.

    Args:
        loss: weighted sum of `losses`.
        losses: each objective by name, without its weight.
        expression: predicted value of each token after the perturbation, in the unit of `values`.
        gepc: the same, predicted from the cell embedding.
        gep_zero: log-odds that the gene is expressed, from the hidden state.
        gepc_zero: log-odds that the gene is expressed, from the cell embedding.
        class_logits: logits of each cell's class, (cells, classes).
        cell_embedding: embedding of every cell, (cells, hidden).
        last_hidden_state: hidden state of every token, with the hidden axis appended.
        hidden_states: input of the first layer and output of each layer, if requested.
        attentions: attention probabilities of each layer, if requested and attention is eager.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    expression: Tensor | None = None
    gepc: Tensor | None = None
    gep_zero: Tensor | None = None
    gepc_zero: Tensor | None = None
    class_logits: Tensor | None = None
    cell_embedding: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ConstantStart(nn.Linear):
    """A last layer that returns a constant, `start`, until it is trained."""

    def __init__(self, n_inputs: int, start: float) -> None:
        super().__init__(n_inputs, 1)
        self.start = start


class ExpressionHead(nn.Module):
    """Predict a token's value from its hidden state (GEP) and, optionally, whether the gene is expressed.

    Source: bowang-lab/scGPT:scgpt/model/model.py:769 (ExprDecoder).
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.value = _three_layers(config)
        self.zero = _three_layers(config) if config.explicit_zero_prob else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return values, (tokens,), and the log-odds of being expressed, (tokens,), or None.

        Args:
            hidden: hidden states, with the embedding of domain and modality appended if the config has one, (tokens,
                width).
        """
        zero = None if self.zero is None else self.zero(hidden).squeeze(-1)
        return self.value(hidden).squeeze(-1), zero


class AffineExpressionHead(nn.Module):
    """Predict a token's value after a perturbation as coefficient × value + bias, both from its hidden state.

    A new head predicts no change: its coefficients are 1 and its biases 0. In the original they are random.

    Source: bowang-lab/scGPT:scgpt/model/generation_model.py (AffineExprDecoder).
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.coefficient, self.bias = _three_layers(config, start=1.0), _three_layers(config, start=0.0)
        self.zero = _three_layers(config) if config.explicit_zero_prob else None

    def forward(self, hidden: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return values, (tokens,), and the log-odds of being expressed, (tokens,), or None.

        Args:
            hidden: hidden states, (tokens, hidden).
            values: value of each token before the perturbation, (tokens,).
        """
        coefficient, bias = self.coefficient(hidden).squeeze(-1), self.bias(hidden).squeeze(-1)
        zero = None if self.zero is None else self.zero(hidden).squeeze(-1)
        return coefficient * values.to(coefficient.dtype) + bias, zero


class CellToGeneHead(nn.Module):
    """Predict a gene's value in a cell from the cell embedding and the gene embedding (GEPC).

    The gene embedding becomes a query, q = sigmoid(W · gene). `gepc_query` decides how it meets the cell embedding c:
    "inner_product" computes (V · q) · c; "concat" and "sum" pass [c, q] or c + q through a small network.

    Source: bowang-lab/scGPT:scgpt/model/model.py:820 (MVCDecoder). "concat" and "sum" raise an error there; ours are
        what its layers are sized for.
    """

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        # The modality widens the query as well, the domain does not. Source: scgpt/model/multiomic_model.py.
        width, cell_width = config.hidden_size * (1 + config.modality_at_decoder), _width_with_context(config)
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
        """Return values, (tokens,), and the log-odds of being expressed, (tokens,), or None.

        Args:
            cell_embedding: embedding of each token's cell, with the domain embedding appended if the config has one,
                (tokens, width).
            gene_embedding: embedding of each token's gene, with that of domain and modality appended if the heads read
                modalities, (tokens, width).
        """
        query = torch.sigmoid(self.query(gene_embedding.detach() if self.detach else gene_embedding))
        if self.project is not None:
            zero = None if self.project_zero is None else (self.project_zero(query) * cell_embedding).sum(-1)
            return (self.project(query) * cell_embedding).sum(-1), zero
        combined = torch.cat([cell_embedding, query], dim=-1) if self.style == "concat" else cell_embedding + query
        return self.value(self.activation(self.hidden(combined))).squeeze(-1), None


class ClassHead(nn.Module):
    """Predict logits of classes from the cell embedding; as a domain discriminator it reverses its input's gradient.

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
        """Return logits, (cells, classes), for embeddings of shape (cells, hidden)."""
        if self.adversarial:
            # 2x − x has the value x. Its gradient is −1, because the detached 2x has none.
            cell_embedding = 2 * cell_embedding.detach() - cell_embedding
        return self.out(self.layers(cell_embedding))


def _width_with_context(config: ScGPTConfig) -> int:
    """Return the width of a state to which the embedding of domain and modality is appended, if heads read one."""
    return config.hidden_size * (1 + (config.domain_embedding or config.modality_at_decoder))


def _three_layers(config: ScGPTConfig, start: float | None = None) -> nn.Sequential:
    """Return a network from a token's hidden state to a number; a new one returns `start`, if that is given."""
    width = config.hidden_size
    hidden = [
        nn.Linear(_width_with_context(config), width),
        nn.LeakyReLU(),
        nn.Linear(width, width),
        nn.LeakyReLU(),
    ]
    return nn.Sequential(*hidden, nn.Linear(width, 1) if start is None else ConstantStart(width, start))
