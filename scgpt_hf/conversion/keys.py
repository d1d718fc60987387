"""Which parameter of ours each key of an original state dict is, and what keys and shapes tell of the network.

The one key map of the project. Every key is taken, left out for a reason that is reported, or an error.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]

# Their prefix and ours; the first that fits counts.
_PREFIXES = (
    ("encoder.embedding.", "scgpt.gene_encoder.embedding."),
    ("encoder.enc_norm.", "scgpt.gene_encoder.norm."),
    ("value_encoder.enc_norm.", "scgpt.value_encoder.norm."),
    ("value_encoder.", "scgpt.value_encoder."),
    ("bn.", "scgpt.input_norm."),
    ("transformer_encoder.layers.", "scgpt.layers."),
    ("decoder.fc.", "expression_head.value."),
    ("decoder.zero_logit.", "expression_head.zero."),
    ("mvc_decoder.gene2query.", "cell_to_gene_head.query."),
    ("mvc_decoder.W.", "cell_to_gene_head.project."),
    ("mvc_decoder.W_zero_logit.", "cell_to_gene_head.project_zero."),
    ("mvc_decoder.fc1.", "cell_to_gene_head.hidden."),
    ("mvc_decoder.hidden_activation.", "cell_to_gene_head.activation."),
    ("mvc_decoder.fc2.", "cell_to_gene_head.value."),
    ("cls_decoder._decoder.", "class_head.layers."),
    ("cls_decoder.out_layer.", "class_head.out."),
    ("grad_reverse_discriminator._decoder.", "domain_head.layers."),
    ("grad_reverse_discriminator.out_layer.", "domain_head.out."),
    ("batch_encoder.embedding.", "domain_encoder.embedding."),
    ("batch_encoder.enc_norm.", "domain_encoder.norm."),
)
# The same matrix under three names: of torch.nn.MultiheadAttention, of flash-attn, and of its wrapper in scGPT 0.2.5.
_ATTENTION = (
    (re.compile(r"\.self_attn\.(?:in_proj_|(?:_impl\.)?Wqkv\.)"), ".self_attn.qkv_proj."),
    (re.compile(r"\.self_attn\._impl\."), ".self_attn."),
)
_DOMAIN_NORM = re.compile(r"dsbn\.bns\.(\d+)\.(running_mean|running_var|num_batches_tracked)")
_ZERO_HEADS = ("decoder.zero_logit.", "mvc_decoder.W_zero_logit.")
_LAYER = re.compile(r"transformer_encoder\.layers\.(\d+)\.")

_REFUSED = (
    (
        re.compile(r"pert_encoder\.|decoder\.(coeff|bias)_decoder\."),
        "a perturbation model (TransformerGenerator): it adds a flag to every token and scales the input it is given, "
        "so that without these keys every output would be another. scgpt_hf has no place for them",
    ),
    (
        re.compile(r"dsbn\.bns\.\d+\.(weight|bias)"),
        "domain-specific batch norm with affine parameters, which scgpt_hf has not",
    ),
)
_FLAGS = (
    "marks the genes to be generated in the original's generative training, which scgpt_hf has not; reading cells, as "
    "embed_data does, never uses it"
)
_MODALITIES = (
    "expression heads of a multi-omic model are told the modality of each gene, for which scgpt_hf has no input; the "
    "encoder and the cell embedding do not depend on it"
)
_CANNOT_RUN = "this query style cannot run with batch labels or explicit zeros, in the original either"


def sort_keys(weights: Weights, where: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the place in our model of each key that is taken, and the reason for each that is left out.

    A place is a name of our state dict, or a row of it: `scgpt.input_norm.running_mean[2]`.

    Args:
        weights: tensors by original key.
        where: the file, for messages.

    Raises:
        ValueError: a key of something that we cannot represent, of no scGPT model, or twice in two layouts.
    """
    for pattern, what in _REFUSED:
        if found := [key for key in weights if pattern.match(key)]:
            raise ValueError(f"{where}: {_some(found, weights)} belong to {what}; it cannot be converted")
    left_out = _left_out(weights)
    places = {key: _place_of(key) for key in weights if key not in left_out}
    if unknown := [key for key, place in places.items() if place is None]:
        raise ValueError(
            f"{where}: {_some(unknown, weights)} belong to no part of an scGPT model; is this the state dict of "
            "another model?"
        )
    taken: dict[str, str] = {}
    first: dict[str, str] = {}
    for key, place in places.items():
        taken[key] = str(place)
        if first.setdefault(taken[key], key) != key:
            raise ValueError(f"{where}: {first[taken[key]]!r} and {key!r} are the same weights; keep one of them")
    return taken, left_out


def infer_settings(weights: Weights, where: str) -> dict[str, Any]:
    """Return the fields of `ScGPTConfig` that keys and shapes tell with certainty.

    Args:
        weights: the tensors that are taken, by original key.
        where: the file, for messages.

    Raises:
        ValueError: a key without which there is no scGPT model is missing or not a matrix.
    """
    n_genes, width = _matrix(weights, "encoder.embedding.weight", where)
    settings: dict[str, Any] = {
        "vocab_size": n_genes,
        "hidden_size": width,
        "intermediate_size": _matrix(weights, "transformer_encoder.layers.0.linear1.weight", where)[0],
        "num_hidden_layers": len({layer[1] for key in weights if (layer := _LAYER.match(key))}),
        "value_encoder": "scaling",
        "explicit_zero_prob": _has(weights, *_ZERO_HEADS),
        "domain_embedding": _has(weights, "batch_encoder."),
        "domain_head": _has(weights, "grad_reverse_discriminator."),
        "input_norm": "domain" if _has(weights, "dsbn.") else "batch" if _has(weights, "bn.") else "none",
    }
    if _has(weights, "value_encoder.embedding."):
        n_value_ids = _matrix(weights, "value_encoder.embedding.weight", where)[0]
        settings |= {"value_encoder": "category", "n_value_ids": n_value_ids}
    elif _has(weights, "value_encoder."):
        settings["value_encoder"] = "continuous"
    if _has(weights, "mvc_decoder.fc1."):
        read = _matrix(weights, "mvc_decoder.fc1.weight", where)[1]
        settings["gepc_query"] = "sum" if read == width else "concat"
    elif _has(weights, "mvc_decoder."):
        settings["gepc_query"] = "inner_product"
    if _has(weights, "cls_decoder."):
        hidden = re.compile(r"cls_decoder\._decoder\.\d+\.weight")
        settings["class_head_layers"] = 1 + sum(bool(hidden.match(key)) and weights[key].ndim == 2 for key in weights)
        settings["num_labels"] = _matrix(weights, "cls_decoder.out_layer.weight", where)[0]
    settings["n_domains"] = _n_domains(weights, where)
    settings["loss_weights"] = _objectives(weights)
    return settings


def place_weights(weights: Weights, taken: Mapping[str, str], model: nn.Module, where: str) -> Weights:
    """Return the state dict of our model: every parameter filled, every taken key used, no shape changed.

    Args:
        weights: tensors by original key.
        taken: place of each key, from `sort_keys`.
        model: whose parameters are to be filled; may be on the meta device.
        where: the file, for messages.

    Raises:
        ValueError: a key without a place in the model, a parameter without a key, another shape, or numbers of another
            kind.
    """
    expected = _places(model.state_dict())
    if homeless := [key for key, place in taken.items() if place not in expected]:
        raise ValueError(
            f"{where}: {_some(homeless, weights)} have no place in the model that args.json and the other keys describe"
        )
    if missing := expected.keys() - set(taken.values()):
        names = {_original_key(place): expected[place] for place in sorted(missing)}
        raise ValueError(f"{where} lacks {_some(names, names)}; it would stay random, so nothing is converted")
    for key, place in taken.items():
        found, wanted = weights[key], expected[place]
        if found.shape != wanted.shape:
            raise ValueError(f"{where}: {key!r} has shape {tuple(found.shape)}; expected {tuple(wanted.shape)}")
        if found.dtype != wanted.dtype and not (found.is_floating_point() and wanted.is_floating_point()):
            raise ValueError(f"{where}: {key!r} holds {found.dtype}; expected {wanted.dtype}")
    filled = {place: weights[key].to(expected[place].dtype).contiguous() for key, place in taken.items()}
    rows: dict[str, list[Tensor]] = {}
    for place in expected:  # in the order of rows
        rows.setdefault(place.partition("[")[0], []).append(filled[place])
    return {name: torch.stack(parts) if f"{name}[0]" in filled else parts[0] for name, parts in rows.items()}


def _place_of(key: str) -> str | None:
    if norm := _DOMAIN_NORM.fullmatch(key):
        return f"scgpt.input_norm.{norm[2]}[{int(norm[1])}]"
    for theirs, ours in _PREFIXES:
        if key.startswith(theirs):
            place = ours + key.removeprefix(theirs)
            for pattern, replacement in _ATTENTION:
                place = pattern.sub(replacement, place)
            return place
    return None


def _original_key(place: str) -> str:
    """Return the key of a place in the layout of torch.nn.MultiheadAttention."""
    if row := re.fullmatch(r"scgpt\.input_norm\.(\w+)\[(\d+)\]", place):
        return f"dsbn.bns.{row[2]}.{row[1]}"
    place = place.replace("self_attn.qkv_proj.", "self_attn.in_proj_")
    return next((theirs + place.removeprefix(ours) for theirs, ours in _PREFIXES if place.startswith(ours)), place)


def _places(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is to be filled: whole tensors, and row by row the statistics that are kept per domain."""
    places: dict[str, Tensor] = {}
    per_domain = state.get("scgpt.input_norm.running_mean", torch.empty(0)).ndim == 2
    for name, tensor in state.items():
        if per_domain and name.startswith("scgpt.input_norm."):
            places |= {f"{name}[{domain}]": row for domain, row in enumerate(tensor)}
        else:
            places[name] = tensor
    return places


def _left_out(weights: Weights) -> dict[str, str]:
    reasons = {"flag_encoder.": _FLAGS}
    if _has(weights, "mod_encoder."):
        reasons |= dict.fromkeys(("mod_encoder.", "batch_encoder.", "decoder.", "mvc_decoder."), _MODALITIES)
    elif _has(weights, "mvc_decoder.fc1.") and _has(weights, "batch_encoder.", "decoder.zero_logit."):
        reasons["mvc_decoder."] = _CANNOT_RUN
    return {key: reason for key in weights for prefix, reason in reasons.items() if key.startswith(prefix)}


def _objectives(weights: Weights) -> dict[str, float]:
    """Return weight 1 for the objective of each head, so that none is missing and none is random."""
    heads = {"gep": "decoder.fc.", "gepc": "mvc_decoder.", "dar": "grad_reverse_discriminator.", "cls": "cls_decoder."}
    present = [name for name, prefix in heads.items() if _has(weights, prefix)]
    if _has(weights, *_ZERO_HEADS):
        present += [f"{name}_zero" for name in ("gep", "gepc") if name in present]
    return dict.fromkeys(present, 1.0) or {"ecs": 1.0}  # elastic cell similarity needs no head


def _n_domains(weights: Weights, where: str) -> int:
    for key in ("batch_encoder.embedding.weight", "grad_reverse_discriminator.out_layer.weight"):
        if key in weights:
            return _matrix(weights, key, where)[0]
    return len({norm[1] for key in weights if (norm := _DOMAIN_NORM.fullmatch(key))})


def _matrix(weights: Weights, key: str, where: str) -> tuple[int, int]:
    if key not in weights:
        raise ValueError(f"{where} lacks {key!r}; is this the state dict of another model?")
    if weights[key].ndim != 2 or not weights[key].numel():
        raise ValueError(f"{where}: {key!r} has shape {tuple(weights[key].shape)}; expected a matrix")
    rows, columns = weights[key].shape
    return rows, columns


def _has(weights: Weights, *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in weights)


def _some(keys: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """Return the number of keys, and the first three with their shapes."""
    keys = list(keys)
    shown = ", ".join(f"{key!r} {tuple(tensors[key].shape)}" for key in keys[:3])
    return f"{len(keys):,} keys, e.g. {shown}," if len(keys) > 3 else shown
