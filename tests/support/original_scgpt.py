"""A reference implementation of the original scGPT: checkpoints in its file layout, and its forward pass.

It was written from the description in shared/fixtures/scgpt_parity/README.md, and tests/parity compares it with tensors
of the original. Tests that have no shared data can therefore use it instead.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Original:
    """A network of the original: its sizes, the arguments of its constructor, and the layout of its state dict."""

    n_genes: int = 40
    width: int = 12
    n_heads: int = 3
    d_hid: int = 10
    n_layers: int = 2
    n_bins: int = 7
    values: Literal["continuous", "category", "scaling"] = "continuous"
    pre_norm: bool = False
    pooling: Literal["cls", "average", "weighted"] = "cls"
    explicit_zero: bool = False
    query: Literal["inner_product", "concat", "sum"] | None = "inner_product"
    n_domains: int = 0  # batch labels, for decoders and discriminator
    norm: Literal["none", "batch", "domain"] = "none"
    n_classes: int = 0
    class_layers: int = 3
    flags: bool = False
    layout: Literal["in_proj", "Wqkv", "_impl.Wqkv"] = "in_proj"
    max_seq_len: int = 30

    @property
    def vocab(self) -> dict[str, int]:
        """Ids of special tokens and genes in a random order that depends on the number of genes."""
        ids = np.random.default_rng(self.n_genes).permutation(self.n_genes + 3)
        tokens = ["<pad>", "<cls>", "<eoc>", *(f"GENE{i}" for i in range(self.n_genes))]
        return {token: int(index) for token, index in zip(tokens, ids, strict=True)}

    @property
    def args(self) -> dict[str, Any]:
        """Contents of the args.json that the original writes."""
        category = self.values == "category"
        return {
            **{"embsize": self.width, "nheads": self.n_heads, "d_hid": self.d_hid, "nlayers": self.n_layers},
            **{"n_layers_cls": self.class_layers, "n_bins": self.n_bins, "max_seq_len": self.max_seq_len},
            **{"dropout": 0.2, "pad_token": "<pad>", "input_emb_style": self.values, "load_model": None},
            "input_style": "log1p" if self.values == "scaling" else "binned",
            "mask_value": self.n_bins + 1 if category else -1,
            "pad_value": self.n_bins if category else -2,
            **{"mask_ratio": [0.25, 0.5, 0.75], "MVC": self.query is not None, "save_dir": "save/somewhere"},
        }


def weights_of(original: Original, seed: int = 0) -> Tensors:
    """Return a random state dict in the layout of torch.nn.MultiheadAttention."""
    d, head_width = original.width, original.width * (2 if original.n_domains else 1)
    shapes: dict[str, tuple[int, ...]] = {"encoder.embedding.weight": (original.n_genes + 3, d)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})

    def head(name: str, n_layers: int, n_out: int) -> None:
        for layer in range(n_layers - 1):
            linear(f"{name}._decoder.{3 * layer}", d, d)
            norm(f"{name}._decoder.{3 * layer + 2}")
        linear(f"{name}.out_layer", n_out, d)

    norm("encoder.enc_norm")
    if original.flags:
        shapes["flag_encoder.weight"] = (2, d)
    if original.values == "continuous":
        linear("value_encoder.linear1", d, 1)
        linear("value_encoder.linear2", d, d)
        norm("value_encoder.norm")
    if original.values == "category":
        shapes["value_encoder.embedding.weight"] = (original.n_bins + 2, d)
        norm("value_encoder.enc_norm")
    if original.n_domains:
        shapes["batch_encoder.embedding.weight"] = (original.n_domains, d)
        norm("batch_encoder.enc_norm")
        head("grad_reverse_discriminator", 3, original.n_domains)
    if original.norm == "batch":
        norm("bn")
    for name in {"batch": ["bn"], "domain": [f"dsbn.bns.{i}" for i in range(original.n_domains)]}.get(
        original.norm, []
    ):
        shapes |= {f"{name}.running_mean": (d,), f"{name}.running_var": (d,), f"{name}.num_batches_tracked": ()}
    for layer in (f"transformer_encoder.layers.{index}" for index in range(original.n_layers)):
        shapes |= {f"{layer}.self_attn.in_proj_weight": (3 * d, d), f"{layer}.self_attn.in_proj_bias": (3 * d,)}
        linear(f"{layer}.self_attn.out_proj", d, d)
        linear(f"{layer}.linear1", original.d_hid, d)
        linear(f"{layer}.linear2", d, original.d_hid)
        norm(f"{layer}.norm1")
        norm(f"{layer}.norm2")
    for name in ("decoder.fc", *(["decoder.zero_logit"] if original.explicit_zero else [])):
        linear(f"{name}.0", d, head_width)
        linear(f"{name}.2", d, d)
        linear(f"{name}.4", 1, d)
    if original.query is not None:
        linear("mvc_decoder.gene2query", 64 if original.query == "concat" else d, d)
    if original.query == "inner_product":
        shapes["mvc_decoder.W.weight"] = (head_width, d)
        if original.explicit_zero:
            linear("mvc_decoder.W_zero_logit", head_width, d)
    elif original.query is not None:
        linear("mvc_decoder.fc1", 64, d + 64 if original.query == "concat" else d)
        shapes["mvc_decoder.hidden_activation.weight"] = (1,)
        linear("mvc_decoder.fc2", 1, 64)
    if original.n_classes:
        head("cls_decoder", original.class_layers, original.n_classes)
    generator = torch.Generator().manual_seed(seed)
    return {name: _random_tensor(name, shape, generator) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    numbers = torch.randn(shape, generator=generator) * 0.4
    return numbers.abs() + 0.5 if name.endswith("running_var") else numbers


def in_layout(weights: Tensors, layout: str) -> Tensors:
    """Rename the keys of a state dict to those of another layout."""
    if layout == "in_proj":
        return weights
    renamed = {re.sub(r"self_attn\.in_proj_", f"self_attn.{layout}.", key): value for key, value in weights.items()}
    out = "self_attn._impl.out_proj" if layout == "_impl.Wqkv" else "self_attn.out_proj"
    return {key.replace("self_attn.out_proj", out): value for key, value in renamed.items()}


def write_checkpoint(folder: Path, original: Original, weights: Tensors | None = None) -> Path:
    """Write args.json, vocab.json and best_model.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(original.args))
    (folder / "vocab.json").write_text(json.dumps(original.vocab))
    torch.save(
        in_layout(weights_of(original) if weights is None else weights, original.layout), folder / "best_model.pt"
    )
    return folder


def forward(weights: Tensors, original: Original, inputs: Tensors) -> Tensors:
    """Compute what the original returns for padded cells in evaluation mode, with loops over cells and heads.

    Args:
        weights: state dict in the layout of torch.nn.MultiheadAttention.
        original: the network.
        inputs: `ids` and `values`, (cells, tokens); `real`, true at tokens, false at padding; `domains`, (cells,);
            optionally `queries`, true at the genes that scGPT's generative training asks for.
    """
    w = _Weights(weights)
    inputs = {"queries": torch.zeros_like(inputs["real"])} | inputs
    results: dict[str, list[torch.Tensor]] = {}
    for ids, values, real, domain, asked in zip(
        *(inputs[k] for k in ("ids", "values", "real", "domains", "queries")), strict=True
    ):
        genes = w.norm("encoder.enc_norm", weights["encoder.embedding.weight"][ids])
        hidden = _normalize(w, original, _embed(w, original, genes, values), int(domain))
        if asked.any():
            hidden[asked] = genes[asked] + weights["flag_encoder.weight"][1]
        for layer in range(original.n_layers):
            hidden = _layer(w, original, f"transformer_encoder.layers.{layer}", hidden, real, asked)
        cell = hidden[0] if original.pooling == "cls" else hidden.mean(0)
        if original.pooling == "weighted":
            cell = (hidden * values[:, None]).sum(0)
            cell = cell / cell.norm()
        domain_embedding = []
        if original.n_domains:
            table = weights["batch_encoder.embedding.weight"]
            domain_embedding = [w.norm("batch_encoder.enc_norm", table[domain])]
            results.setdefault("dar", []).append(w.classify("grad_reverse_discriminator", cell, 3, 0.01))
        if original.n_classes:
            results.setdefault("class_logits", []).append(w.classify("cls_decoder", cell, original.class_layers, 0.0))
        results.setdefault("cell_embedding", []).append(cell)
        results.setdefault("last_hidden_state", []).append(hidden)
        states = torch.cat([hidden, *(one.expand_as(hidden) for one in domain_embedding)], -1)
        results.setdefault("gep", []).append(w.three_layers("decoder.fc", states))
        if original.explicit_zero:
            results.setdefault("gep_zero", []).append(w.three_layers("decoder.zero_logit", states))
        for name, predicted in _gepc(w, original, torch.cat([cell, *domain_embedding]), genes).items():
            results.setdefault(name, []).append(predicted)
    return {name: torch.stack(per_cell) for name, per_cell in results.items()}


class _Weights:
    def __init__(self, weights: Tensors) -> None:
        self.of = weights

    def linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return states @ self.of[f"{name}.weight"].T + self.of.get(f"{name}.bias", 0)

    def norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        centered = states - states.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.of[f"{name}.weight"] + self.of[f"{name}.bias"]

    def three_layers(self, name: str, states: torch.Tensor) -> torch.Tensor:
        for layer in (0, 2):
            states = F.leaky_relu(self.linear(f"{name}.{layer}", states), 0.01)
        return self.linear(f"{name}.4", states)[:, 0]

    def classify(self, name: str, cell: torch.Tensor, n_layers: int, slope: float) -> torch.Tensor:
        for layer in range(n_layers - 1):
            cell = F.leaky_relu(self.linear(f"{name}._decoder.{3 * layer}", cell), slope)
            cell = self.norm(f"{name}._decoder.{3 * layer + 2}", cell)
        return self.linear(f"{name}.out_layer", cell)


def _embed(w: _Weights, original: Original, genes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if original.values == "scaling":
        return genes * values[:, None]
    if original.values == "category":
        return genes + w.norm("value_encoder.enc_norm", w.of["value_encoder.embedding.weight"][values.long()])
    first = w.linear("value_encoder.linear1", values.clamp(max=512)[:, None]).relu()
    return genes + w.norm("value_encoder.norm", w.linear("value_encoder.linear2", first))


def _normalize(w: _Weights, original: Original, hidden: torch.Tensor, domain: int) -> torch.Tensor:
    if original.norm == "none":
        return hidden
    name = "bn" if original.norm == "batch" else f"dsbn.bns.{domain}"
    hidden = (hidden - w.of[f"{name}.running_mean"]) / (w.of[f"{name}.running_var"] + 6.1e-5).sqrt()
    return hidden * w.of["bn.weight"] + w.of["bn.bias"] if original.norm == "batch" else hidden


def _layer(
    w: _Weights, original: Original, name: str, hidden: torch.Tensor, real: torch.Tensor, asked: torch.Tensor
) -> torch.Tensor:
    # A query attends to the given genes and to itself.
    allowed = (real & ~asked)[None] | torch.diag(asked)

    def attend(states: torch.Tensor) -> torch.Tensor:
        parts = states @ w.of[f"{name}.self_attn.in_proj_weight"].T + w.of[f"{name}.self_attn.in_proj_bias"]
        q, k, v = parts.chunk(3, -1)
        width = original.width // original.n_heads
        heads = []
        for own in (slice(head * width, (head + 1) * width) for head in range(original.n_heads)):
            scores = (q[:, own] @ k[:, own].T / width**0.5).masked_fill(~allowed, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, own])
        attended = torch.cat(heads, -1)
        # scGPT's code does not project what queries attended to.
        return torch.where(asked[:, None], attended, w.linear(f"{name}.self_attn.out_proj", attended))

    def feed_forward(states: torch.Tensor) -> torch.Tensor:
        return w.linear(f"{name}.linear2", w.linear(f"{name}.linear1", states).relu())

    if original.pre_norm:
        hidden = w.norm(f"{name}.norm1", hidden)
        hidden = w.norm(f"{name}.norm2", hidden + attend(hidden))
        return hidden + feed_forward(hidden)
    hidden = w.norm(f"{name}.norm1", hidden + attend(hidden))
    return w.norm(f"{name}.norm2", hidden + feed_forward(hidden))


def _gepc(w: _Weights, original: Original, cell: torch.Tensor, genes: torch.Tensor) -> Tensors:
    if original.query is None:
        return {}
    query = w.linear("mvc_decoder.gene2query", genes).sigmoid()
    if original.query == "inner_product":
        found = {"gepc": w.linear("mvc_decoder.W", query) @ cell}
        return found | (
            {"gepc_zero": w.linear("mvc_decoder.W_zero_logit", query) @ cell} if original.explicit_zero else {}
        )
    combined = cell + query if original.query == "sum" else torch.cat([cell.expand(len(genes), -1), query], -1)
    states = w.linear("mvc_decoder.fc1", combined)
    states = torch.where(states > 0, states, w.of["mvc_decoder.hidden_activation.weight"] * states)
    return {"gepc": w.linear("mvc_decoder.fc2", states)[:, 0]}
