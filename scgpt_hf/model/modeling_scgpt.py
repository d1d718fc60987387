"""The scGPT encoder, and one thin class per task on top of it.

`hidden = encoder(gene_embedding[input_ids] + value_encoder(values))`, without positions: the genes of a cell are a set.
Input is padded, (cells, tokens) with `attention_mask`, or packed, (1, tokens of all cells) with `cu_seq_lens_q`; both
give the same numbers. What enters the encoder is made in `embeddings_scgpt.py`; what leaves it is read in
`heads_scgpt.py` and judged in `objectives_scgpt.py`; attention within cells is in `attention_scgpt.py`.
"""

# transformers' methods and decorators are untyped, and PyTorch's modules return Any when called.
# mypy: disable-error-code="no-untyped-call, untyped-decorator, no-any-return"

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_scgpt import VARLEN, cell_boundaries, cell_of, eager_attention, mask_for, packing_of
from .configuration_scgpt import ScGPTConfig
from .embeddings_scgpt import DomainNorm, TableEncoder, input_norm_of, value_encoder_of
from .heads_scgpt import CellToGeneHead, ClassHead, ExpressionHead, ScGPTForPreTrainingOutput
from .objectives_scgpt import (
    bernoulli_nll,
    class_cross_entropy,
    contrastive_cells,
    domain_cross_entropy,
    elastic_cell_similarity,
    masked_mse,
    share_of_batch,
)


class Recording(TypedDict, total=False):
    """What any of the models may be asked to return beside its output, or instead of it."""

    output_hidden_states: bool | None
    output_attentions: bool | None
    return_dict: bool | None


@dataclass
class ScGPTModelOutput(ModelOutput):
    """What the encoder returns.

    Args:
        last_hidden_state: hidden state of every token, shaped like `input_ids` with the hidden axis appended.
        cell_embedding: pooled hidden state of every cell, (cells, hidden).
        gene_embedding: normalised embedding of every token's gene, before values; same shape as `last_hidden_state`.
        hidden_states: input of the first layer and output of each, if asked for.
        attentions: attention probabilities of each layer, (cells, heads, tokens, tokens), if asked for and eager.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]  # None is what ModelOutput asks of every field
    cell_embedding: Tensor = None  # type: ignore[assignment]
    gene_embedding: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ScGPTAttention(nn.Module):
    """Multi-head self-attention within cells, through the attention function the config names."""

    def __init__(self, config: ScGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return attended hidden states and, from eager attention, the probabilities."""
        heads = self.qkv_proj(hidden).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = (states.transpose(1, 2) for states in heads.unbind(-3))  # (cells, heads, tokens, width)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out_proj(attended.flatten(-2)), weights


class ScGPTLayer(GradientCheckpointingLayer):
    """Attention and a ReLU stream_config-forward network, each with a residual and a norm placed by `norm_scheme`."""

    def __init__(self, config: ScGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm_scheme = config.norm_scheme
        self.self_attn = ScGPTAttention(config, layer_idx)
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return hidden states of the same shape."""
        if self.norm_scheme == "post":
            hidden = self.norm1(hidden + self._attend(hidden, attention_mask, **kwargs))
            return self.norm2(hidden + self._feed_forward(hidden))
        if self.norm_scheme == "pre":
            hidden = hidden + self._attend(self.norm1(hidden), attention_mask, **kwargs)
            return hidden + self._feed_forward(self.norm2(hidden))
        hidden = self.norm1(hidden)
        hidden = self.norm2(hidden + self._attend(hidden, attention_mask, **kwargs))
        return hidden + self._feed_forward(hidden)

    def _attend(self, hidden: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        return self.dropout(self.self_attn(hidden, attention_mask, **kwargs)[0])

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(hidden)))))


class ScGPTPreTrainedModel(PreTrainedModel):
    """What all scGPT models share with the library: initial weights, and which of its features they support."""

    config_class = ScGPTConfig
    config: ScGPTConfig
    base_model_prefix = "scgpt"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScGPTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ScGPTLayer, "attentions": ScGPTAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw initial weights as the original does: PyTorch's defaults, and a narrow uniform for tables.

        The library's normal(0.02) with zero biases would not do: normalised, the value encoder would see only signs.

        Source: bowang-lab/scGPT:scgpt/model/model.py:151.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.1, 0.1)
        elif isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        elif isinstance(module, DomainNorm):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return the attention function to use: ours, which knows packed input, where none is asked for."""
        if requested_attention is None:
            requested_attention = "eager" if self.config.output_attentions else VARLEN
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class ScGPTModel(ScGPTPreTrainedModel):
    """The encoder: hidden states of genes and an embedding of each cell.

    `AutoModel.from_pretrained(name)(**processor(adata)).cell_embedding` is one vector per cell, (cells, hidden).

    Args:
        config: sizes and choices.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        self.gene_encoder = TableEncoder(config, config.vocab_size, config.pad_token_id)
        self.value_encoder = value_encoder_of(config)
        self.input_norm = input_norm_of(config)
        self.layers = nn.ModuleList(ScGPTLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        has_final_norm = config.norm_scheme == "pre"
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if has_final_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of genes."""
        return self.gene_encoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of genes."""
        self.gene_encoder.embedding = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        domain_ids: Tensor | None = None,
        input_cell_embedding: Tensor | None = None,
        **kwargs: Unpack[Recording],
    ) -> ScGPTModelOutput:
        """Return hidden states and cell embeddings.

        Args:
            input_ids: vocabulary ids, `<cls>` first in each cell; (cells, tokens), or (1, tokens) packed. int64.
            values: what the model reads of each gene, same shape; may be left out when `input_cell_embedding` is given.
            attention_mask: true at real tokens, (cells, tokens); only padded.
            cu_seq_lens_q: where each packed cell begins and ends, int32 (cells + 1,).
            cu_seq_lens_k: the same again, as the library passes it.
            max_length_q: tokens of the longest packed cell, or more; also not below those behind the last cell.
            max_length_k: the same again.
            domain_ids: experimental batch of each cell, int64 (cells,).
            input_cell_embedding: replaces the embedded `<cls>` of each cell, to generate from it; (cells, hidden).
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`; see `Recording`.

        Raises:
            ValueError: layouts are mixed, or something the config needs is missing.
        """
        layout = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        packing = packing_of(input_ids, attention_mask, *layout)
        if packing is not None and self.config.counts_padding:
            raise ValueError(
                f"{self.config.counts_padding} is not defined for packed input, which has none; pad the cells"
            )
        gene_embedding = self.gene_encoder(input_ids)
        hidden = self._add_values(gene_embedding, values, optional=input_cell_embedding is not None)
        hidden = self._normalise_input(hidden, domain_ids)
        boundaries = cell_boundaries(input_ids, cu_seq_lens_q)
        if input_cell_embedding is not None:
            flat = hidden.flatten(0, 1).index_copy(0, boundaries[:-1].long(), input_cell_embedding.to(hidden.dtype))
            hidden = flat.view_as(hidden)
        mask = mask_for(self.config._attn_implementation, attention_mask, packing, hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask, packing=packing, **kwargs)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return ScGPTModelOutput(hidden, self._pool_cells(hidden, values, boundaries), gene_embedding)

    def _add_values(self, gene_embedding: Tensor, values: Tensor | None, *, optional: bool) -> Tensor:
        """Return the embedded input: genes and values added, or multiplied when the encoder is "scaling"."""
        if values is None:
            if not optional:
                raise ValueError("values are missing; the processor makes them of counts: model(**processor(adata))")
            return gene_embedding
        if values.shape != gene_embedding.shape[:-1]:
            raise ValueError(
                f"values {tuple(values.shape)} and input_ids {tuple(gene_embedding.shape[:-1])} differ in shape"
            )
        if self.value_encoder is None:
            return gene_embedding * values[..., None].to(gene_embedding.dtype)
        return gene_embedding + self.value_encoder(values)

    def _normalise_input(self, hidden: Tensor, domain_ids: Tensor | None) -> Tensor:
        if isinstance(self.input_norm, DomainNorm):
            return self.input_norm(hidden, _needed(domain_ids, "domain_ids"))
        return hidden if self.input_norm is None else self.input_norm(hidden.flatten(0, 1)).view_as(hidden)

    def _pool_cells(self, hidden: Tensor, values: Tensor | None, boundaries: Tensor) -> Tensor:
        """Return the embedding of each cell, (cells, hidden); averages count padding, as the original's do."""
        if self.config.cell_pooling == "average":
            return hidden.mean(dim=1)
        if self.config.cell_pooling == "weighted" and values is not None:
            return F.normalize((hidden * values[..., None].to(hidden.dtype)).sum(dim=1), dim=-1)
        return hidden.flatten(0, 1).index_select(0, boundaries[:-1])


class ScGPTForPreTraining(ScGPTPreTrainedModel):
    """The encoder with every head the objectives in `loss_weights` need; also what AutoModelForMaskedLM loads.

    `model(**processor(adata, mask_ratios=[0.5])).loss` is what pretraining makes small. The library's own Trainer needs
    `TrainingArguments(label_names=["labels"])` to report it in validation, since other arguments speak of labels too.

    Args:
        config: sizes and choices; its `loss_weights` say which heads there are.

    Raises:
        ValueError: no objective weighs more than 0.
    """

    _auto_class = "AutoModelForPreTraining"
    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        if not any(config.weighs(name) for name in config.loss_weights):
            raise ValueError(
                f"loss_weights {config.loss_weights} leave nothing to train on; give an objective a weight above 0"
            )
        self.scgpt = ScGPTModel(config)
        self.expression_head = ExpressionHead(config) if config.weighs("gep") else None
        self.cell_to_gene_head = CellToGeneHead(config) if config.weighs("gepc") else None
        self.domain_encoder = TableEncoder(config, config.n_domains) if config.domain_embedding else None
        self.domain_head = ClassHead(config, config.n_domains, adversarial=True) if config.domain_head else None
        self.class_head = ClassHead(config, config.num_labels) if config.weighs("cls") else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        domain_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[Recording],
    ) -> ScGPTForPreTrainingOutput:
        """Return predictions and, given labels, the loss and its parts.

        Input is as for `ScGPTModel.forward`. `labels`, float32, shaped like `values`, hold the true value where one is
        hidden and `IGNORE` elsewhere; `label_positions`, int64 (masked,), says where that is in the flattened input,
        and lets the heads run there only. `class_labels`, int64 (cells,), are for the objective "cls".
        `num_items_in_batch` counts the labels of the whole batch, over accumulation steps and processes, of which this
        is a part.

        Raises:
            ValueError: something that the config's heads or objectives need is missing.
        """
        cells = (input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        encode = partial(self.scgpt, *cells, domain_ids=domain_ids, return_dict=True)
        encoded = encode(**kwargs)
        seen = self._predict(encoded, cu_seq_lens_q, label_positions, domain_ids)
        loss, losses = None, None
        config, given = self.config, num_items_in_batch
        if labels is not None:
            labels = labels if label_positions is None else labels.flatten().index_select(0, label_positions)
            share = share_of_batch(labels, given)
            objectives = {
                "gep": lambda: masked_mse(seen["gep"], labels, given),
                "gepc": lambda: masked_mse(seen["gepc"], labels, given),
                "gep_zero": lambda: bernoulli_nll(seen["gep_zero"], labels, given),
                "gepc_zero": lambda: bernoulli_nll(seen["gepc_zero"], labels, given),
                "ecs": lambda: share * elastic_cell_similarity(encoded.cell_embedding, config.ecs_threshold),
                "cce": lambda: (
                    share * contrastive_cells(encoded.cell_embedding, encode().cell_embedding, config.cce_temperature)
                ),
                "dar": lambda: share * domain_cross_entropy(seen["dar"], _needed(domain_ids, "domain_ids")),
                "cls": lambda: share * class_cross_entropy(seen["class_logits"], _needed(class_labels, "class_labels")),
            }
            losses = {name: objective() for name, objective in objectives.items() if config.weighs(name)}
            loss = torch.stack([config.loss_weights[name] * value for name, value in losses.items()]).sum()
        return ScGPTForPreTrainingOutput(
            loss=loss,
            losses=losses,
            **seen,
            cell_embedding=encoded.cell_embedding,
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _predict(
        self, encoded: ScGPTModelOutput, packed: Tensor | None, positions: Tensor | None, domain_ids: Tensor | None
    ) -> dict[str, Any]:
        """Return what the heads read at the given positions, or at all, by name of the output's field."""
        cells, (n_rows, n_tokens, _) = encoded.cell_embedding, encoded.last_hidden_state.shape
        at = torch.arange(n_rows * n_tokens, device=cells.device) if positions is None else positions
        # Behind the last packed cell nothing is predicted.
        cell = at // n_tokens if packed is None else cell_of(at, packed).clamp(max=cells.shape[0] - 1)
        seen: dict[str, Any] = dict.fromkeys(("gep", "gepc", "gep_zero", "gepc_zero", "dar", "class_logits"))
        told = []  # what the expression heads are told beside a state: the domain of its cell
        if self.domain_encoder is not None:
            told = [self.domain_encoder(_needed(domain_ids, "domain_ids")).index_select(0, cell)]
        if self.expression_head is not None:
            hidden = encoded.last_hidden_state.flatten(0, 1).index_select(0, at)
            seen["gep"], seen["gep_zero"] = self.expression_head(torch.cat([hidden, *told], dim=-1))
        if self.cell_to_gene_head is not None:
            genes = encoded.gene_embedding.flatten(0, 1).index_select(0, at)
            own = cells.index_select(0, cell)
            seen["gepc"], seen["gepc_zero"] = self.cell_to_gene_head(torch.cat([own, *told], dim=-1), genes)
        if positions is None:
            seen = {name: None if it is None else it.view(n_rows, n_tokens) for name, it in seen.items()}
        if self.domain_head is not None:
            seen["dar"] = self.domain_head(cells)
        if self.class_head is not None:
            seen["class_logits"] = self.class_head(cells)
        return seen


class ScGPTForSequenceClassification(ScGPTPreTrainedModel):
    """The encoder with a head that tells each cell's class, or regresses `num_labels` numbers per cell.

    `model(**processor(adata)).logits.argmax(-1)` is a class for each cell, named by `model.config.id2label`; given
    `labels`, the output has a `loss`.

    Args:
        config: sizes and choices; its `num_labels` say how many classes there are.
    """

    _auto_class = "AutoModelForSequenceClassification"
    accepts_loss_kwargs = True

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        self.scgpt = ScGPTModel(config)
        self.class_head = ClassHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        labels: Tensor | None = None,
        domain_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[Recording],
    ) -> SequenceClassifierOutput:
        """Return logits, (cells, labels), and given labels the loss, chosen by `problem_type` as in the library.

        Input is as for `ScGPTModel.forward`. `labels` are the class of each cell, int64 (cells,), or float (cells,
        labels) for several classes or numbers per cell. `num_items_in_batch` counts the cells of the whole batch.
        """
        cells = (input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        encoded = self.scgpt(*cells, domain_ids=domain_ids, return_dict=True, **kwargs)
        logits, loss = self.class_head(encoded.cell_embedding), None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
        return SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


def _needed(given: Tensor | None, name: str) -> Tensor:
    if given is None:
        raise ValueError(f"{name} are missing, which this config's heads or objectives need; pass them, int64 (cells,)")
    return given
