"""The scGPT encoder and one class per task on top of it.

    hidden = encoder(gene_embedding[input_ids] + value_encoder(values))

There are no positions, because the genes of a cell are a set: their order does not matter. Input is padded, (cells,
tokens) with `attention_mask`, or packed, (1, tokens of all cells) with `cu_seq_lens_q`; both give the same numbers.

Read `embeddings_scgpt` for the input of the encoder, `attention_scgpt` for attention within cells, `heads_scgpt` for
the predictions and `objectives_scgpt` for the losses.
"""

# transformers' methods and decorators are untyped, and PyTorch's modules return Any when called.
# mypy: disable-error-code="no-untyped-call, untyped-decorator, no-any-return"

import math
from collections.abc import Callable, Collection
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

from .attention_scgpt import VARLEN, build_mask, cell_offsets, eager_attention_forward, find_cells, make_packing
from .configuration_scgpt import ScGPTConfig
from .count_decoder_scgpt import CountHead
from .embeddings_scgpt import (
    PERTURBED,
    DomainNorm,
    FlagEncoder,
    ModalityTable,
    TableEncoder,
    make_input_norm,
    make_modality_encoder,
    make_value_encoder,
)
from .heads_scgpt import (
    AffineExpressionHead,
    CellToGeneHead,
    ClassHead,
    ConstantStart,
    ExpressionHead,
    ScGPTForPerturbationOutput,
    ScGPTForPreTrainingOutput,
)
from .objectives_scgpt import (
    bernoulli_nll,
    class_cross_entropy,
    contrast_views,
    contrastive_cells,
    elastic_cell_similarity,
    masked_mse,
    share_of_batch,
)
from .query_attention_scgpt import GivenKeys  # noqa: F401  # transformers 5.6 copies only what this file imports
from .shortcut_scgpt import STATE_WEIGHT, CellShortcut

# Row of the flag table that marks queries. Source: bowang-lab/scGPT, branch dev-temp, scgpt/model/model.py.
_QUERY = 1
# Fields of the output with one prediction for each gene.
_EXPRESSION = ("gep", "gepc", "gep_zero", "gepc_zero")


class OutputOptions(TypedDict, total=False):
    """Options of every model's `forward` for additional outputs, as in the library.

    Attributes:
        output_hidden_states: return the hidden states of all layers.
        output_attentions: return attention probabilities; needs eager attention.
        return_dict: return a `ModelOutput` (default) instead of a tuple.
    """

    output_hidden_states: bool | None
    output_attentions: bool | None
    return_dict: bool | None


@dataclass
class ScGPTModelOutput(ModelOutput):
    """The output of `ScGPTModel`.

    Args:
        last_hidden_state: hidden state of every token, shaped like `input_ids` with the hidden axis appended.
        cell_embedding: pooled hidden state of every cell, (cells, hidden).
        gene_embedding: normalized embedding of every token's gene, before values; same shape as `last_hidden_state`.
        hidden_states: input of the first layer and output of each layer, if requested.
        attentions: attention probabilities of each layer, (cells, heads, tokens, tokens), if requested and attention is
            eager.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]  # ModelOutput requires a default of None
    cell_embedding: Tensor = None  # type: ignore[assignment]
    gene_embedding: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ScGPTAttention(nn.Module):
    """Multi-head self-attention within cells, using the attention function that the config selects."""

    def __init__(self, config: ScGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, queries: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return attended hidden states and, with eager attention, the probabilities."""
        heads = self.qkv_proj(hidden).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = (states.transpose(1, 2) for states in heads.unbind(-3))  # (cells, heads, tokens, width)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        attended = attended.flatten(-2)
        projected = self.out_proj(attended)
        if queries is not None and not self.config.query_out_proj:
            projected = torch.where(queries[..., None], attended, projected)
        return projected, weights


class ScGPTLayer(GradientCheckpointingLayer):
    """One encoder layer: attention and a ReLU feed-forward network, each with a residual connection and a norm.

    `norm_scheme` places the norms. "post" is the original transformer, h = norm(h + f(h)). "pre" is h = h + f(norm(h)).
    "scgpt_pre" reproduces scGPT's pre-norm layer, in which the residual starts from the normalized input:
    h = norm(h); h = h + f(h).
    """

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
        """Return hidden states of the same shape, (cells, tokens, hidden)."""
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
    """Base class of all scGPT models: initial weights, and the library features that they support."""

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
        """Draw initial weights as the original does: PyTorch's defaults, and uniform(−0.1, 0.1) for tables.

        The library's default, normal(0, 0.02) with zero biases, does not work here. With zero biases the first layer of
        the value encoder is proportional to the value, and the LayerNorm after the second one removes the factor: all
        positive values would get the same embedding.

        Source: bowang-lab/scGPT:scgpt/model/model.py:151.
        """
        super()._init_weights(module)
        if isinstance(module, ConstantStart):
            init.zeros_(module.weight)
            init.constant_(module.bias, module.start)
        elif isinstance(module, FlagEncoder):
            rows = torch.zeros_like(module.weight)
            rows[PERTURBED].normal_()
            init.copy_(module.weight, rows)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.1, 0.1)
        elif isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        else:
            _init_own_parameters(module)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Select the attention function: `scgpt_varlen`, which supports packed input, unless another is requested."""
        if requested_attention is None:
            requested_attention = "eager" if self.config.output_attentions else VARLEN
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class ScGPTModel(ScGPTPreTrainedModel):
    """The encoder, which returns hidden states of genes and an embedding of each cell.

    Args:
        config: configuration of the model.

    Example:
        >>> model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
        >>> embedding = model(**processor(adata)).cell_embedding  # (cells, hidden)
    """

    _auto_class = "AutoModel"

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        self.gene_encoder = TableEncoder(config, config.vocab_size, config.pad_token_id)
        self.value_encoder = make_value_encoder(config)
        # Two rows, as in the original, of which only the one of queries is used.
        self.query_flag = nn.Embedding(2, config.hidden_size) if config.objective == "generative" else None
        self.modality_table = ModalityTable(config) if config.modalities else None
        self.input_modality_encoder = make_modality_encoder(config) if config.modality_at_input else None
        self.input_norm = make_input_norm(config)
        self.shortcut = CellShortcut(config) if config.cls_shortcut else None
        self.layers = nn.ModuleList(ScGPTLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        has_final_norm = config.norm_scheme == "pre"  # the original's pre-norm has none
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if has_final_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table of genes."""
        return self.gene_encoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table of genes."""
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
        queries: Tensor | None = None,
        key_positions: Tensor | None = None,
        modality_ids: Tensor | None = None,
        input_cell_embedding: Tensor | None = None,
        input_addition: Tensor | None = None,
        **kwargs: Unpack[OutputOptions],
    ) -> ScGPTModelOutput:
        """Compute hidden states and cell embeddings.

        Args:
            input_ids: vocabulary ids, int64, with `<cls>` first in each cell; (cells, tokens), or (1, tokens) when
                packed.
            values: value of each token, same shape. Optional if `input_cell_embedding` is passed.
            attention_mask: true at real tokens, (cells, tokens); for padded input only.
            cu_seq_lens_q: offsets of packed cells, int32 (cells + 1,).
            cu_seq_lens_k: the same tensor; the library passes it for keys.
            max_length_q: length of the longest packed cell or of the padding after the last, or any larger number.
            max_length_k: the same number.
            domain_ids: domain (experimental batch) of each cell, int64 (cells,).
            queries: true at genes whose value is asked for, bool, shaped like `input_ids`; needs
                `objective="generative"`. Their values are not read, and only they themselves attend to them.
            key_positions: positions of the other tokens, int64 (keys,), ascending; for packed input with queries,
                whose `cu_seq_lens_k` and `max_length_k` are then those of these tokens.
            modality_ids: modality of each token, int64, shaped like `input_ids`; by default that of its vocabulary id.
            input_cell_embedding: replaces the embedded `<cls>` token of each cell, to generate expression from a cell
                embedding; (cells, hidden).
            input_addition: is added to the embedded gene and value of each token, shaped like `input_ids` with the
                hidden axis appended.
            **kwargs: see `OutputOptions`.

        Raises:
            ValueError: arguments of both layouts are mixed, or an input that the config needs is missing.
        """
        layout = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        packing = make_packing(input_ids, attention_mask, *layout, queries, key_positions)
        if packing is not None and (settings := self.config.padding_dependent_settings):
            raise ValueError(f"{settings} depends on padding, and packed input has none; pass padded cells")
        if queries is not None and values is not None:
            values = values.masked_fill(queries, 0.0)  # pooling and the shortcut do not read values of queries either
        gene_embedding = self.gene_encoder(input_ids)
        hidden = self._add_values(gene_embedding, values, queries, optional=input_cell_embedding is not None)
        for addition in (input_addition, self._embed_modalities(input_ids, modality_ids)):
            hidden = hidden if addition is None else hidden + addition
        hidden = self._normalize_input(hidden, domain_ids)
        offsets = cell_offsets(input_ids, cu_seq_lens_q)
        cls_positions = offsets[:-1].long()  # in the flattened input
        if input_cell_embedding is not None:
            hidden = _replace_rows(hidden, cls_positions, input_cell_embedding)
        shortcut = None
        if self.shortcut is not None and values is not None and input_cell_embedding is None:
            shortcut = self.shortcut(input_ids, values, offsets)
            states = hidden.flatten(0, 1).index_select(0, cls_positions)
            hidden = _replace_rows(hidden, cls_positions, states + shortcut)
        mask = build_mask(self.config._attn_implementation, attention_mask, packing, hidden, queries)
        for layer in self.layers:
            hidden = layer(hidden, mask, packing=packing, queries=queries, **kwargs)  # hooks of the library: positional
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        cell_embedding = self._pool_cells(hidden, values, offsets)
        if self.shortcut is not None and shortcut is not None:
            cell_embedding = shortcut + self.shortcut.state_weight * cell_embedding
        return ScGPTModelOutput(hidden, cell_embedding, gene_embedding)

    def _add_values(
        self, gene_embedding: Tensor, values: Tensor | None, queries: Tensor | None, *, optional: bool
    ) -> Tensor:
        """Add the embedded values to the gene embedding, or multiply by the values if the encoder is "scaling".

        Queries have no value: the flag of queries is added to their gene embedding.
        """
        if queries is not None and self.query_flag is None:
            raise ValueError(
                f"this model has no queries: its config has objective={self.config.objective!r}; leave queries out, or "
                "train a model with objective='generative'"
            )
        if values is None and not optional:
            raise ValueError("values are missing; create them with the processor: model(**processor(adata))")
        embedded = gene_embedding if values is None else self._embed_values(gene_embedding, values)
        if self.query_flag is None or queries is None:
            return embedded
        return torch.where(queries[..., None], gene_embedding + self.query_flag.weight[_QUERY], embedded)

    def _embed_values(self, gene_embedding: Tensor, values: Tensor) -> Tensor:
        if values.shape != gene_embedding.shape[:-1]:
            raise ValueError(
                f"values {tuple(values.shape)} and input_ids {tuple(gene_embedding.shape[:-1])} differ in shape"
            )
        if self.value_encoder is None:
            return gene_embedding * values[..., None].to(gene_embedding.dtype)
        return gene_embedding + self.value_encoder(values)

    def _embed_modalities(self, input_ids: Tensor, modality_ids: Tensor | None) -> Tensor | None:
        """Return the embedding of each token's modality, if the encoder reads it."""
        if self.input_modality_encoder is None or self.modality_table is None:
            return None
        return self.input_modality_encoder(self.modality_table(input_ids) if modality_ids is None else modality_ids)

    def _normalize_input(self, hidden: Tensor, domain_ids: Tensor | None) -> Tensor:
        if isinstance(self.input_norm, DomainNorm):
            return self.input_norm(hidden, _require(domain_ids, "domain_ids"))
        return hidden if self.input_norm is None else self.input_norm(hidden.flatten(0, 1)).view_as(hidden)

    def _pool_cells(self, hidden: Tensor, values: Tensor | None, offsets: Tensor) -> Tensor:
        """Return the embedding of each cell, (cells, hidden); averages include padding, as in the original."""
        if self.config.cell_pooling == "average":
            return hidden.mean(dim=1)
        if self.config.cell_pooling == "weighted" and values is not None:
            return F.normalize((hidden * values[..., None].to(hidden.dtype)).sum(dim=1), dim=-1)
        return hidden.flatten(0, 1).index_select(0, offsets[:-1])  # `<cls>` is the first token of each cell


class ScGPTForPreTraining(ScGPTPreTrainedModel):
    """The encoder with the heads of the objectives in `loss_weights`. `AutoModelForMaskedLM` loads it too.

    With the `Trainer` of the library, set `TrainingArguments(label_names=["labels"])`. Otherwise it takes
    `label_positions` and `class_labels` for labels as well, does not find them, and reports no validation loss.

    Args:
        config: configuration of the model. A head exists if its objective has a weight above 0.

    Raises:
        ValueError: no objective has a weight above 0.

    Example:
        >>> sizes = {"vocab_size": processor.vocab_size, "pad_token_id": processor.pad_id, "num_hidden_layers": 1}
        >>> model = ScGPTForPreTraining(ScGPTConfig(**sizes))
        >>> model(**processor(adata[:4], mask_ratios=[0.5])).loss.backward()
    """

    _auto_class = "AutoModelForPreTraining"
    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        if not any(config.has_objective(name) for name in config.loss_weights):
            raise ValueError(
                f"no objective of loss_weights {config.loss_weights} has a weight above 0; give one a positive weight"
            )
        self.scgpt = ScGPTModel(config)
        self.expression_head = ExpressionHead(config) if config.has_objective("gep") else None
        self.cell_to_gene_head = CellToGeneHead(config) if config.has_objective("gepc") else None
        self.domain_encoder = TableEncoder(config, config.n_domains) if config.domain_embedding else None
        self.modality_encoder = make_modality_encoder(config) if config.modality_at_decoder else None
        self.domain_head = ClassHead(config, config.n_domains, adversarial=True) if config.domain_head else None
        self.class_head = ClassHead(config, config.num_labels) if config.has_objective("cls") else None
        self.count_head = CountHead(config) if config.has_objective("counts") else None
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: D417
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
        label_ids: Tensor | None = None,
        label_cells: Tensor | None = None,
        domain_ids: Tensor | None = None,
        queries: Tensor | None = None,
        key_positions: Tensor | None = None,
        class_labels: Tensor | None = None,
        count_ids: Tensor | None = None,
        count_values: Tensor | None = None,
        count_cells: Tensor | None = None,
        view_input_ids: Tensor | None = None,
        view_values: Tensor | None = None,
        view_attention_mask: Tensor | None = None,
        view_cu_seq_lens_q: Tensor | None = None,
        view_cu_seq_lens_k: Tensor | None = None,
        view_max_length_q: int | None = None,
        view_max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_cells_in_batch: Tensor | int | None = None,
        num_labelled_in_batch: Tensor | int | None = None,
        modality_ids: Tensor | None = None,
        second_pass: bool = True,
        input_cell_embedding: Tensor | None = None,
        **kwargs: Unpack[OutputOptions],
    ) -> ScGPTForPreTrainingOutput:
        """Compute predictions and, if labels are passed, the loss and its parts.

        Args:
            input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, domain_ids:
                see `ScGPTModel.forward`.
            queries, key_positions: masked genes as queries, for models with `objective="generative"`; see
                `ScGPTModel.forward`.
            labels: true value of each masked token, `IGNORE` elsewhere; float32, shaped like `values`.
            label_positions: positions of the masked tokens in the flattened input, int64 (masked,). The heads then
                compute predictions at these positions only.
            label_ids: vocabulary id of each masked gene, int64 (masked,), if masked genes are left out of the input;
                see `targets_scgpt.leave_out_masked`. `labels` then has the shape (masked,) too.
            label_cells: position in this input of the cell of each of these genes, int64 (masked,).
            class_labels: class of each cell, `IGNORE` where unknown, int64 (cells,), for the objective "cls".
            count_ids: vocabulary id of each non-zero count of all cells, int64 (entries,), for the objective "counts".
            count_values: the raw count, float32 (entries,).
            count_cells: position of its cell in this input, int64 (entries,), ascending.
            view_input_ids, view_values, …: a second view of the same cells, for the objective "views"; as the
                arguments without `view_`.
            num_items_in_batch: number of labels of the complete batch, over all accumulation steps and processes, if
                this is a part of it.
            num_cells_in_batch: number of cells of the complete batch; used with `num_items_in_batch` only.
            num_labelled_in_batch: number of cells of the complete batch with a class; used with `num_items_in_batch`
                only. Without it, each part counts by its share of the masked tokens.
            modality_ids, input_cell_embedding: see `ScGPTModel.forward`.
            second_pass: compute the objective "gen", if it has a weight. The trainer starts it after some steps.
            **kwargs: see `OutputOptions`.

        Raises:
            ValueError: an input that a head or an objective of the config needs is missing.
        """
        cells = (input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        view = (view_values, view_attention_mask, view_cu_seq_lens_q, view_cu_seq_lens_k, view_max_length_q)
        encode_any = partial(self.scgpt, domain_ids=domain_ids, return_dict=True)
        encode = partial(encode_any, *cells, queries=queries, key_positions=key_positions, modality_ids=modality_ids)
        encoded = encode(input_cell_embedding=input_cell_embedding, **kwargs)
        cell_embedding = encoded.cell_embedding
        modalities = self._modalities_of(input_ids, modality_ids, label_positions, label_ids)
        where = (cu_seq_lens_q, label_positions, (label_ids, label_cells), (domain_ids, modalities))
        predicted, losses = self._predict(encoded, *where), None
        if labels is not None:
            self._require_queries(queries)
            targets = {
                "labels": labels if label_positions is None else labels.flatten().index_select(0, label_positions),
                **{"domain_ids": domain_ids, "class_labels": class_labels},
                **{"count_ids": count_ids, "count_values": count_values, "count_cells": count_cells},
            }
            again = {
                "cce": lambda: encode().cell_embedding,
                "gen": lambda: self._predict(encode(input_cell_embedding=cell_embedding.detach()), *where)["gep"],
                "views": lambda: encode_any(_require(view_input_ids, "view_input_ids"), *view).cell_embedding,
            }
            totals = (num_items_in_batch, num_cells_in_batch, num_labelled_in_batch)
            losses = self._losses(cell_embedding, predicted, targets, again, totals, () if second_pass else ("gen",))
        return self._to_output(losses, predicted, encoded)

    def _to_output(
        self, losses: dict[str, Tensor] | None, predicted: dict[str, Any], encoded: ScGPTModelOutput
    ) -> ScGPTForPreTrainingOutput:
        """Return the output of `forward`, with the weighted sum of the losses."""
        loss = None
        if losses is not None:
            loss = torch.stack([self.config.loss_weights[name] * value for name, value in losses.items()]).sum()
        return ScGPTForPreTrainingOutput(
            loss=loss,
            losses=losses,
            **predicted,
            cell_embedding=encoded.cell_embedding,
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _require_queries(self, queries: Tensor | None) -> None:
        """Raise if the masked genes of a generative model are no queries: it would read them as genes with values."""
        if self.config.objective == "generative" and queries is None:
            raise ValueError(
                "queries are missing: with objective='generative' in the config, masked genes are queries; pass "
                "queries=True to the processor, to pack or to pad"
            )

    def _losses(
        self,
        cells: Tensor,
        predicted: dict[str, Any],
        targets: dict[str, Tensor | None],
        encode_again: dict[str, Callable[[], Tensor]],
        totals: tuple[Tensor | int | None, ...],
        skipped: Collection[str],
    ) -> dict[str, Tensor]:
        """Return the loss of each objective that has a weight.

        Args:
            cells: embeddings of the cells, (cells, hidden).
            predicted: predictions of the heads, as `_predict` returns them.
            targets: arguments of `forward` by name, with the labels of the predictions as `labels`.
            encode_again: objective → function that encodes the cells once more, or their second views, and returns
                what the objective compares: cell embeddings, or predictions.
            totals: numbers of labels, cells and labelled cells of the complete batch, as `forward` takes them.
            skipped: objectives that are not computed now.
        """
        config, required = self.config, lambda name: _require(targets[name], name)
        domain_ids = targets["domain_ids"]
        n_labels, n_cells, n_labelled = totals if totals[0] is not None else (None, None, None)
        share, labels = share_of_batch(required("labels"), n_labels), required("labels")
        # Without their number, the labelled cells of each part count by its share of the masked tokens.
        class_share = share if n_labelled is None else torch.ones_like(share)
        # Functions, so that only the objectives with a weight are computed; some cost a second forward pass.
        objectives = {
            "gep": lambda: masked_mse(predicted["gep"], labels, n_labels),
            "gepc": lambda: masked_mse(predicted["gepc"], labels, n_labels),
            "gep_zero": lambda: bernoulli_nll(predicted["gep_zero"], labels, n_labels),
            "gepc_zero": lambda: bernoulli_nll(predicted["gepc_zero"], labels, n_labels),
            "gen": lambda: masked_mse(encode_again["gen"](), labels, n_labels),
            "ecs": lambda: share * elastic_cell_similarity(cells, config.ecs_threshold),
            "cce": lambda: share * contrastive_cells(cells, encode_again["cce"](), config.cce_temperature),
            "dar": lambda: share * class_cross_entropy(predicted["dar"], required("domain_ids")),
            "counts": lambda: _mean_over_cells(self._count_loss(cells, targets), n_cells),
            "cls": lambda: (
                class_share * class_cross_entropy(predicted["class_logits"], required("class_labels"), n_labelled)
            ),
            "views": lambda: _mean_over_cells(
                contrast_views(cells, encode_again["views"](), config.view_temperature, domain_ids),
                n_cells,
            ),
        }
        wanted = [name for name in objectives if config.has_objective(name) and name not in skipped]
        return {name: objectives[name]() for name in wanted}

    def _count_loss(self, cells: Tensor, targets: dict[str, Tensor | None]) -> Tensor:
        """Return the negative log-likelihood of each cell's raw counts, (cells,)."""
        assert self.count_head is not None
        names = ("count_ids", "count_values", "count_cells")
        ids, counts, cell_of_entry = (_require(targets[name], name) for name in names)
        domain_ids = targets["domain_ids"]
        if self.config.n_domains > 1:
            domain_ids = _require(domain_ids, "domain_ids")
        return self.count_head.loss(cells, domain_ids, ids, counts, cell_of_entry)

    def _predict(
        self,
        encoded: ScGPTModelOutput,
        cu_seq_lens: Tensor | None,
        label_positions: Tensor | None,
        left_out: tuple[Tensor | None, Tensor | None],
        context: tuple[Tensor | None, Tensor | None],
    ) -> dict[str, Any]:
        """Return the predictions of all heads by field of the output.

        Args:
            encoded: output of the encoder.
            cu_seq_lens: offsets of packed cells.
            label_positions: tokens whose genes are predicted, (masked,); None for all tokens.
            left_out: `label_ids` and `label_cells` of the genes to predict instead, if these are no tokens.
            context: domain of each cell, (cells,), and modality of each predicted gene, as `_modalities_of` returns it.
        """
        cells, label_ids = encoded.cell_embedding, left_out[0]
        if label_ids is None:
            cell, genes, hidden = self._gather_tokens(encoded, cu_seq_lens, label_positions)
        else:
            cell, genes, hidden = _require(left_out[1], "label_cells"), self._embed_left_out(label_ids), None
        predicted: dict[str, Any] = dict.fromkeys((*_EXPRESSION, "dar", "class_logits"))
        of_genes, of_cells = self._embed_context(cell, *context)
        if self.expression_head is not None and hidden is not None:
            inputs = torch.cat([hidden, *of_genes], dim=-1)
            predicted["gep"], predicted["gep_zero"] = self.expression_head(inputs)
        if self.cell_to_gene_head is not None and genes is not None:
            inputs = torch.cat([cells.index_select(0, cell), *of_cells], dim=-1)
            queries = torch.cat([genes, *of_genes], dim=-1) if self.modality_encoder is not None else genes
            predicted["gepc"], predicted["gepc_zero"] = self.cell_to_gene_head(inputs, queries)
        if label_ids is None and label_positions is None:
            shape = encoded.last_hidden_state.shape[:2]
            predicted = {name: None if output is None else output.view(shape) for name, output in predicted.items()}
        if self.domain_head is not None:
            predicted["dar"] = self.domain_head(cells)
        if self.class_head is not None:
            predicted["class_logits"] = self.class_head(cells)
        return predicted

    def _modalities_of(
        self,
        input_ids: Tensor,
        modality_ids: Tensor | None,
        label_positions: Tensor | None,
        label_ids: Tensor | None,
    ) -> Tensor | None:
        """Return the modality of each gene that is predicted, int64 (masked,), if the heads read it."""
        if self.modality_encoder is None or self.scgpt.modality_table is None:
            return None
        if label_ids is not None:
            return self.scgpt.modality_table(label_ids)
        ids = (self.scgpt.modality_table(input_ids) if modality_ids is None else modality_ids).flatten()
        return ids if label_positions is None else ids.index_select(0, label_positions)

    def _embed_context(
        self, cell: Tensor, domain_ids: Tensor | None, modalities: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Embed domain and modality, which the expression heads read after a gene's state and after the cell embedding.

        It is the sum of the embeddings of domain and modality; at the cell embedding the modality is that of `<cls>`.

        Args:
            cell: position of the cell of each predicted gene, (masked,).
            domain_ids: domain of each cell, (cells,).
            modalities: modality of each predicted gene, (masked,).

        Returns:
            A list of one tensor (masked, hidden), or of none if the config has neither embedding; for genes and cells.
        """
        of_genes = of_cells = None
        if self.domain_encoder is not None:
            of_genes = of_cells = self.domain_encoder(_require(domain_ids, "domain_ids")).index_select(0, cell)
        if self.modality_encoder is not None and modalities is not None:
            of_cls = modalities.new_full((1,), self.config.modalities.index("<cls>"))
            embedded, of_cls = self.modality_encoder(modalities), self.modality_encoder(of_cls).expand(len(cell), -1)
            of_genes = embedded if of_genes is None else of_genes + embedded
            of_cells = of_cls if of_cells is None else of_cells + of_cls
        return [one for one in (of_genes,) if one is not None], [one for one in (of_cells,) if one is not None]

    def _gather_tokens(
        self, encoded: ScGPTModelOutput, cu_seq_lens: Tensor | None, label_positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the inputs of the expression heads at the given positions, or at all positions.

        Returns:
            Position of the cell of each token, (tokens,); its gene's embedding and its hidden state, each (tokens,
            hidden), or None if no head reads them.
        """
        n_rows, n_tokens, _ = encoded.last_hidden_state.shape
        positions = label_positions
        if positions is None:
            positions = torch.arange(n_rows * n_tokens, device=encoded.cell_embedding.device)
        if cu_seq_lens is None:
            cell = positions // n_tokens
        else:  # padding after the last cell belongs to no cell; its predictions are not used, so any cell will do
            cell = find_cells(positions, cu_seq_lens).clamp(max=encoded.cell_embedding.shape[0] - 1)
        genes = hidden = None
        if self.cell_to_gene_head is not None:
            genes = encoded.gene_embedding.flatten(0, 1).index_select(0, positions)
        if self.expression_head is not None:
            hidden = encoded.last_hidden_state.flatten(0, 1).index_select(0, positions)
        return cell, genes, hidden

    def _embed_left_out(self, label_ids: Tensor) -> Tensor:
        """Return the embeddings of genes that are no tokens, (masked, hidden).

        Raises:
            ValueError: the model has a GEP head, which reads hidden states.
        """
        if self.expression_head is not None:
            raise ValueError(
                "masked genes are left out of the input, but the model predicts them from their hidden states (gep); "
                "pass them as tokens, or set leave_out_masked=True and no weight for 'gep' in the config"
            )
        return self.scgpt.gene_encoder(label_ids)


class ScGPTForSequenceClassification(ScGPTPreTrainedModel):
    """The encoder with a head that classifies each cell, or regresses `num_labels` numbers per cell.

    Args:
        config: configuration of the model; `num_labels` is the number of classes.

    Example:
        >>> classes = model(**processor(adata)).logits.argmax(-1)
        >>> names = [model.config.id2label[index] for index in classes.tolist()]
    """

    _auto_class = "AutoModelForSequenceClassification"
    accepts_loss_kwargs = True

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        self.scgpt = ScGPTModel(config)
        self.class_head = ClassHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: D417
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
        **kwargs: Unpack[OutputOptions],
    ) -> SequenceClassifierOutput:
        """Compute logits, (cells, labels), and the loss if labels are passed; `problem_type` selects the loss.

        Args:
            input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, domain_ids:
                see `ScGPTModel.forward`.
            labels: class of each cell, int64 (cells,), or float (cells, labels) for several classes or numbers per
                cell.
            num_items_in_batch: number of cells of the complete batch, if this is a part of it.
            **kwargs: see `OutputOptions`.
        """
        cells = (input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        encoded = self.scgpt(*cells, domain_ids=domain_ids, return_dict=True, **kwargs)
        logits, loss = self.class_head(encoded.cell_embedding), None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
        return SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class ScGPTForPerturbation(ScGPTPreTrainedModel):
    """The encoder with a flag for each gene and an affine head, which predicts a cell after a perturbation.

    The input is a control cell: all of its genes with their continuous values (log1p of normalized counts, or counts),
    and a flag for each, which is 1 for the genes that are perturbed. The prediction for a gene is coefficient × value +
    bias. `AutoModelForTokenClassification` loads the model, because it predicts one number for each token.

    Of the objectives in `loss_weights`, "gep" is the squared error of the prediction; "gepc", "gep_zero", "gepc_zero",
    "ecs" and "cls" work as in pretraining, and others are ignored.

    Args:
        config: configuration of the model.

    Raises:
        ValueError: the config embeds values by a table of bins, or passes domains to the heads.

    Source: bowang-lab/scGPT:scgpt/model/generation_model.py (TransformerGenerator); Cui et al. 2024.

    Example:
        >>> batch = processor(adata[:4])  # doctest: +SKIP
        >>> flags = (batch["input_ids"] == perturbed_gene).long()  # doctest: +SKIP
        >>> predicted = model(**batch, perturbation_flags=flags).expression  # (cells, tokens)  # doctest: +SKIP
    """

    _auto_class = "AutoModelForTokenClassification"
    accepts_loss_kwargs = True

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        if config.value_encoder == "category" or config.domain_embedding or config.modality_at_decoder:
            raise ValueError(
                "a perturbation model reads continuous values and has no embedding of domains or modalities; found "
                f"value_encoder={config.value_encoder!r}, domain_embedding={config.domain_embedding} and modalities="
                f"{config.modalities}"
            )
        self.scgpt = ScGPTModel(config)
        self.flag_encoder = FlagEncoder(config)
        width = config.hidden_size
        self.perturbation_encoder = nn.Linear(width, width, bias=False) if config.perturbation_sum else None
        self.expression_head = AffineExpressionHead(config)
        self.cell_to_gene_head = CellToGeneHead(config) if config.has_objective("gepc") else None
        self.class_head = ClassHead(config, config.num_labels) if config.has_objective("cls") else None
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: D417
        self,
        input_ids: Tensor,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        perturbation_flags: Tensor | None = None,
        labels: Tensor | None = None,
        class_labels: Tensor | None = None,
        domain_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[OutputOptions],
    ) -> ScGPTForPerturbationOutput:
        """Predict the value of every token after the perturbation, and compute the loss if labels are passed.

        Args:
            input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, domain_ids:
                see `ScGPTModel.forward`.
            perturbation_flags: 0 for a gene that is not perturbed, 1 for one that is, 2 for padding; int64, shaped like
                `input_ids`.
            labels: value of each token in the perturbed cell, `IGNORE` where nothing is predicted; float32, shaped like
                `values`.
            class_labels: class of each cell, `IGNORE` where unknown, int64 (cells,), for the objective "cls".
            num_items_in_batch: number of labels of the complete batch, if this is a part of it.
            **kwargs: see `OutputOptions`.

        Raises:
            ValueError: `values` or `perturbation_flags` are missing.
        """
        values, flags = _require(values, "values"), _require(perturbation_flags, "perturbation_flags")
        cells = (input_ids, values, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        cell = self._cell_of_token(input_ids, cu_seq_lens_q)
        addition = self.flag_encoder(flags)
        if self.perturbation_encoder is not None:
            addition = addition + self._sum_perturbed(input_ids, flags, cell)
        encoded = self.scgpt(*cells, domain_ids=domain_ids, input_addition=addition, return_dict=True, **kwargs)
        expression, gep_zero = self.expression_head(encoded.last_hidden_state.flatten(0, 1), values.flatten())
        predicted: dict[str, Tensor | None] = {"expression": expression, "gep_zero": gep_zero}
        if self.cell_to_gene_head is not None:
            state_of_token = encoded.cell_embedding.index_select(0, cell)
            predicted["gepc"], predicted["gepc_zero"] = self.cell_to_gene_head(
                state_of_token, encoded.gene_embedding.flatten(0, 1)
            )
        predicted = {name: None if one is None else one.view(input_ids.shape) for name, one in predicted.items()}
        class_logits = None if self.class_head is None else self.class_head(encoded.cell_embedding)
        loss, losses = None, None
        if labels is not None:
            outputs = predicted | {"cls": class_logits, "cells": encoded.cell_embedding}
            losses = self._losses(outputs, labels, class_labels, num_items_in_batch)
            loss = torch.stack([self.config.loss_weights[name] * value for name, value in losses.items()]).sum()
        return ScGPTForPerturbationOutput(
            loss=loss,
            losses=losses,
            **predicted,
            class_logits=class_logits,
            cell_embedding=encoded.cell_embedding,
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _cell_of_token(self, input_ids: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
        """Return the position of the cell of each token of the flattened input, (tokens,)."""
        positions = torch.arange(input_ids.numel(), device=input_ids.device)
        if cu_seq_lens is None:
            return positions // input_ids.shape[1]
        # Padding after the last cell belongs to no cell; its predictions are not used, so any cell will do.
        return find_cells(positions, cu_seq_lens).clamp(max=len(cu_seq_lens) - 2)

    def _sum_perturbed(self, input_ids: Tensor, flags: Tensor, cell: Tensor) -> Tensor:
        """Return for each token the sum of the projected vectors of the perturbed genes of its cell.

        Args:
            input_ids: vocabulary ids.
            flags: flag of each token, same shape.
            cell: position of the cell of each token of the flattened input, (tokens,).
        """
        assert self.perturbation_encoder is not None
        vectors = self.perturbation_encoder(self.scgpt.gene_encoder(input_ids))
        # Multiplied, not selected: the number of perturbed genes would have to be copied from a GPU first.
        vectors = (vectors * (flags == PERTURBED)[..., None].to(vectors.dtype)).flatten(0, 1)
        sums = torch.zeros_like(vectors).index_add(
            0, cell, vectors
        )  # row i: cell i; there are no more cells than tokens
        return sums.index_select(0, cell).view(*input_ids.shape, -1)

    def _losses(
        self,
        outputs: dict[str, Tensor | None],
        labels: Tensor,
        class_labels: Tensor | None,
        n_labels: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Return the loss of each objective that has a weight and a prediction."""
        cells, share = _require(outputs["cells"], "cells"), share_of_batch(labels, n_labels)
        losses = {}
        for name, field, loss in (
            ("gep", "expression", masked_mse),
            ("gepc", "gepc", masked_mse),
            ("gep_zero", "gep_zero", bernoulli_nll),
            ("gepc_zero", "gepc_zero", bernoulli_nll),
        ):
            if self.config.has_objective(name) and (found := outputs.get(field)) is not None:
                losses[name] = loss(found, labels, n_labels)
        if self.config.has_objective("ecs"):
            losses["ecs"] = share * elastic_cell_similarity(cells, self.config.ecs_threshold)
        if self.config.has_objective("cls"):
            logits = _require(outputs["cls"], "class logits")
            losses["cls"] = share * class_cross_entropy(logits, _require(class_labels, "class_labels"))
        return losses


def _init_own_parameters(module: nn.Module) -> None:
    """Set the parameters and buffers that a module of ours holds besides its layers."""
    if isinstance(module, DomainNorm):
        init.zeros_(module.running_mean)
        init.ones_(module.running_var)
        init.zeros_(module.num_batches_tracked)
    elif isinstance(module, ModalityTable):
        init.zeros_(module.of_token)
    elif isinstance(module, CellShortcut):
        init.constant_(module.state_weight, STATE_WEIGHT)
    elif isinstance(module, CountHead):
        init.zeros_(module.domain_hidden)
        init.zeros_(module.bias)
        init.ones_(module.measured)
        if module.log_dispersion is not None:
            init.zeros_(module.log_dispersion)


def _replace_rows(hidden: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Return hidden states whose rows at these positions of the flattened input are replaced."""
    return hidden.flatten(0, 1).index_copy(0, positions, rows.to(hidden.dtype)).view_as(hidden)


def _mean_over_cells(terms: Tensor, n_cells: Tensor | int | None) -> Tensor:
    """Return the mean of a term per cell; or this part's share of the mean over a batch of `n_cells`."""
    return terms.mean() if n_cells is None else terms.sum() / torch.as_tensor(n_cells, device=terms.device)


def _require(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        hints = {"count": "pass with_counts=True to the stream", "view": "pass view_keep to the stream"}
        hint = hints.get(name.split("_")[0], "pass them, int64 (cells,)")
        raise ValueError(f"{name} are missing; a head or objective of this config needs them: {hint}")
    return tensor
