"""Map the keys of an original state dict to the parameters of our model, and infer settings from keys and shapes.

Every key is converted, or left out for a reason that is reported, or raises an error. A target is a name in the state
dict of our model, or one row of a tensor in it, such as `scgpt.input_norm.running_mean[2]`: scGPT's code has a batch
norm for each domain (`dsbn.bns.2.running_mean`), and our model has one tensor with a row for each domain.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]

# (prefix of original keys, prefix of our names); the first that matches is used.
_PREFIXES = (
    ("encoder.embedding.", "scgpt.gene_encoder.embedding."),
    ("encoder.enc_norm.", "scgpt.gene_encoder.norm."),
    ("value_encoder.enc_norm.", "scgpt.value_encoder.norm."),
    ("value_encoder.", "scgpt.value_encoder."),
    ("bn.", "scgpt.input_norm."),
    ("transformer_encoder.layers.", "scgpt.layers."),
    ("decoder.fc.", "expression_head.value."),
    ("decoder.zero_logit.", "expression_head.zero."),
    ("decoder.coeff_decoder.fc.", "expression_head.coefficient."),
    ("decoder.coeff_decoder.zero_logit.", "expression_head.zero."),
    ("decoder.bias_decoder.fc.", "expression_head.bias."),
    ("pert_encoder.", "flag_encoder."),
    ("flag_encoder.", "scgpt.query_flag."),
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
    ("mod_encoder.embedding.", "modality_encoder.embedding."),
    ("mod_encoder.enc_norm.", "modality_encoder.norm."),
)
# The matrix of queries, keys and values has three names: in_proj_ in torch.nn.MultiheadAttention, Wqkv in flash-attn,
# and _impl.Wqkv in the wrapper of flash-attn in scGPT 0.2.5.
_ATTENTION = (
    (re.compile(r"\.self_attn\.(?:in_proj_|(?:_impl\.)?Wqkv\.)"), ".self_attn.qkv_proj."),
    (re.compile(r"\.self_attn\._impl\."), ".self_attn."),
)
_DOMAIN_NORM = re.compile(r"dsbn\.bns\.(\d+)\.(running_mean|running_var|num_batches_tracked)")
_ZERO_HEADS = ("decoder.zero_logit.", "decoder.coeff_decoder.zero_logit.", "mvc_decoder.W_zero_logit.")
_LAYER = re.compile(r"transformer_encoder\.layers\.(\d+)\.")

# Without these weights, every output of the model would change, so leaving them out would be wrong.
_UNSUPPORTED = (
    (
        re.compile(r"dsbn\.bns\.\d+\.(weight|bias)"),
        "domain-specific batch norm with affine parameters, which scgpt_hf does not support",
    ),
)
# Why weights are left out that do not change the embedding of a cell.
_GENERATION_FLAGS = (
    "marks the genes to generate in scGPT's generative training; perturbation models, and models whose results depend "
    "on padding, do not generate; embedding cells, as embed_data does, never uses it"
)
_MODALITIES = (
    "the expression heads of a multi-omic model take the modality of each gene as input, which no file records; pass "
    "modalities=[...] and gene_modalities={...} to convert them; the encoder and the cell embedding do not depend on it"
)
# A buffer of ours that no checkpoint of scGPT's code has; the conversion fills it from the processor.
MODALITY_TABLE = "scgpt.modality_table.of_token"
_UNUSED_ZERO_HEAD = "scGPT's code reads the zero probability of a perturbation model from the coefficient's head only"
_NOT_RUNNABLE = "this query style does not work with batch labels or explicit zeros; it fails in scGPT's code as well"


def map_keys(
    weights: Weights, path: str, modalities: Sequence[str] = (), *, pooling: str = "cls"
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the target of each key that can be converted, and the reason for each key that is left out.

    Args:
        weights: original key → tensor.
        path: path of the weights, for error messages.
        modalities: names of the rows of the modality embedding of a multi-omic model; without them its heads are left
            out.
        pooling: how cells are pooled; generation needs "cls".

    Raises:
        ValueError: a key belongs to an unsupported model or to no scGPT model, or two keys have the same target.
    """
    for pattern, owner in _UNSUPPORTED:
        if found := [key for key in weights if pattern.match(key)]:
            raise ValueError(f"{path}: {_list_keys(found, weights)} belong to {owner}; it cannot be converted")
    n_rows = len(weights["mod_encoder.embedding.weight"]) if "mod_encoder.embedding.weight" in weights else 0
    if modalities and len(modalities) != n_rows:
        raise ValueError(f"{path} has {n_rows} modalities (rows of mod_encoder), found {len(modalities)} names")
    can_generate = pooling == "cls" and not _has(weights, "pert_encoder.", "bn.", "dsbn.")
    left_out = _left_out_keys(weights, with_modalities=bool(modalities), can_generate=can_generate)
    targets = {key: _target_of(key) for key in weights if key not in left_out}
    if unknown := [key for key, target in targets.items() if target is None]:
        raise ValueError(
            f"{path}: {_list_keys(unknown, weights)} belong to no part of an scGPT model; is this the state dict of "
            "another model?"
        )
    converted: dict[str, str] = {}
    key_of_target: dict[str, str] = {}
    for key, target in targets.items():
        converted[key] = str(target)
        first = key_of_target.setdefault(converted[key], key)
        if first != key:
            raise ValueError(f"{path}: {first!r} and {key!r} are two names of the same weights; keep one of them")
    return converted, left_out


def is_perturbation_model(weights: Weights) -> bool:
    """Return whether the weights are those of scGPT's TransformerGenerator, which predicts perturbations."""
    return _has(weights, "pert_encoder.")


def infer_settings(weights: Weights, path: str) -> dict[str, Any]:
    """Return the fields of `ScGPTConfig` that follow with certainty from keys and shapes.

    Args:
        weights: original key → tensor, only those that are converted.
        path: path of the weights, for error messages.

    Raises:
        ValueError: a key that every scGPT model has is missing or is not a matrix.
    """
    n_genes, width = _matrix_shape(weights, "encoder.embedding.weight", path)
    settings: dict[str, Any] = {
        "vocab_size": n_genes,
        "hidden_size": width,
        "intermediate_size": _matrix_shape(weights, "transformer_encoder.layers.0.linear1.weight", path)[0],
        "num_hidden_layers": len({layer[1] for key in weights if (layer := _LAYER.match(key))}),
        "value_encoder": "scaling",
        "explicit_zero_prob": _has(weights, *_ZERO_HEADS),
        "domain_embedding": _has(weights, "batch_encoder."),
        "domain_head": _has(weights, "grad_reverse_discriminator."),
        "input_norm": "domain" if _has(weights, "dsbn.") else "batch" if _has(weights, "bn.") else "none",
    }
    if _has(weights, "value_encoder.embedding."):
        n_value_ids = _matrix_shape(weights, "value_encoder.embedding.weight", path)[0]
        settings |= {"value_encoder": "category", "n_value_ids": n_value_ids}
    elif _has(weights, "value_encoder."):
        settings["value_encoder"] = "continuous"
    if _has(weights, "flag_encoder."):
        # Source: bowang-lab/scGPT, branch dev-temp, scgpt/model/flash_layers.py, which does not project queries.
        settings |= {"objective": "generative", "query_out_proj": False}
    if _has(weights, "mvc_decoder.fc1."):
        n_inputs = _matrix_shape(weights, "mvc_decoder.fc1.weight", path)[1]
        settings["gepc_query"] = "sum" if n_inputs == width else "concat"
    elif _has(weights, "mvc_decoder."):
        settings["gepc_query"] = "inner_product"
    if _has(weights, "cls_decoder."):
        hidden = re.compile(r"cls_decoder\._decoder\.\d+\.weight")
        settings["class_head_layers"] = 1 + sum(bool(hidden.match(key)) and weights[key].ndim == 2 for key in weights)
        settings["num_labels"] = _matrix_shape(weights, "cls_decoder.out_layer.weight", path)[0]
    settings["n_domains"] = _infer_n_domains(weights, path)
    settings["loss_weights"] = _infer_loss_weights(weights)
    return settings


def rename_weights(weights: Weights, converted: Mapping[str, str], model: nn.Module, path: str) -> Weights:
    """Return a complete state dict of our model: every parameter set, every converted key used, all shapes as expected.

    Args:
        weights: original key → tensor.
        converted: original key → target, from `map_keys`.
        model: model whose parameters are set; may be on the meta device.
        path: path of the weights, for error messages.

    Raises:
        ValueError: the model has no parameter for a key, a parameter has no key, or a shape or dtype differs.
    """
    expected = _expected_targets(model.state_dict())
    if unused := [key for key, target in converted.items() if target not in expected]:
        raise ValueError(
            f"{path}: {_list_keys(unused, weights)} do not exist in the model that args.json and the other keys "
            "describe"
        )
    if missing := expected.keys() - set(converted.values()):
        names = {_original_key(target): expected[target] for target in sorted(missing)}
        raise ValueError(
            f"{path} lacks {_list_keys(names, names)}; the checkpoint cannot be converted, because these weights would "
            "be random"
        )
    for key, target in converted.items():
        found, wanted = weights[key], expected[target]
        if found.shape != wanted.shape:
            raise ValueError(f"{path}: {key!r} has shape {tuple(found.shape)}; expected {tuple(wanted.shape)}")
        if found.dtype != wanted.dtype and not (found.is_floating_point() and wanted.is_floating_point()):
            raise ValueError(f"{path}: {key!r} has dtype {found.dtype}; expected {wanted.dtype}")
    tensors = {target: weights[key].to(expected[target].dtype).contiguous() for key, target in converted.items()}
    rows: dict[str, list[Tensor]] = {}
    for target in expected:  # not `tensors`: the rows of a tensor must be in the order of the domains
        rows.setdefault(target.partition("[")[0], []).append(tensors[target])
    return {name: torch.stack(parts) if f"{name}[0]" in tensors else parts[0] for name, parts in rows.items()}


def _target_of(key: str) -> str | None:
    """Return the target of an original key, or None if no scGPT model has the key."""
    if norm := _DOMAIN_NORM.fullmatch(key):
        return f"scgpt.input_norm.{norm[2]}[{int(norm[1])}]"
    for original, ours in _PREFIXES:
        if key.startswith(original):
            target = ours + key.removeprefix(original)
            for pattern, replacement in _ATTENTION:
                target = pattern.sub(replacement, target)
            return target
    return None


def _original_key(target: str) -> str:
    """Return the key of a target in scGPT's checkpoint, its attention weights named as in torch.nn."""
    if row := re.fullmatch(r"scgpt\.input_norm\.(\w+)\[(\d+)\]", target):
        return f"dsbn.bns.{row[2]}.{row[1]}"
    target = target.replace("self_attn.qkv_proj.", "self_attn.in_proj_")
    keys = (original + target.removeprefix(ours) for original, ours in _PREFIXES if target.startswith(ours))
    return next(keys, target)


def _expected_targets(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the targets in a state dict: its tensors, and each row of the batch norm statistics kept per domain."""
    targets: dict[str, Tensor] = {}
    per_domain = state.get("scgpt.input_norm.running_mean", torch.empty(0)).ndim == 2
    for name, tensor in state.items():
        if name == MODALITY_TABLE:
            continue
        if per_domain and name.startswith("scgpt.input_norm."):
            targets |= {f"{name}[{domain}]": row for domain, row in enumerate(tensor)}
        else:
            targets[name] = tensor
    return targets


def _left_out_keys(weights: Weights, *, with_modalities: bool, can_generate: bool) -> dict[str, str]:
    """Return the keys that are not converted, with the reasons."""
    reasons = {"decoder.bias_decoder.zero_logit.": _UNUSED_ZERO_HEAD}
    reasons |= {} if can_generate else {"flag_encoder.": _GENERATION_FLAGS}
    if _has(weights, "mod_encoder.") and not with_modalities:
        reasons |= dict.fromkeys(("mod_encoder.", "batch_encoder.", "decoder.", "mvc_decoder."), _MODALITIES)
    elif _has(weights, "mvc_decoder.fc1.") and _has(weights, "batch_encoder.", "decoder.zero_logit."):
        reasons["mvc_decoder."] = _NOT_RUNNABLE
    return {key: reason for key in weights for prefix, reason in reasons.items() if key.startswith(prefix)}


def _infer_loss_weights(weights: Weights) -> dict[str, float]:
    """Return weight 1 for the objective of each head: then our model has these heads and no others."""
    heads = {
        "gep": ("decoder.fc.", "decoder.coeff_decoder.fc."),
        **{"gepc": ("mvc_decoder.",), "dar": ("grad_reverse_discriminator.",), "cls": ("cls_decoder.",)},
    }
    present = [name for name, prefixes in heads.items() if _has(weights, *prefixes)]
    if _has(weights, *_ZERO_HEADS):
        present += [f"{name}_zero" for name in ("gep", "gepc") if name in present]
    return dict.fromkeys(present, 1.0) or {"ecs": 1.0}  # elastic cell similarity needs no head


def _infer_n_domains(weights: Weights, path: str) -> int:
    """Return the number of domains: rows of an embedding or a head, or else the number of batch norms."""
    for key in ("batch_encoder.embedding.weight", "grad_reverse_discriminator.out_layer.weight"):
        if key in weights:
            return _matrix_shape(weights, key, path)[0]
    return len({norm[1] for key in weights if (norm := _DOMAIN_NORM.fullmatch(key))})


def _matrix_shape(weights: Weights, key: str, path: str) -> tuple[int, int]:
    """Return rows and columns of a matrix. Raise ValueError if it is missing, or is not a matrix."""
    if key not in weights:
        raise ValueError(f"{path} lacks {key!r}; is this the state dict of another model?")
    if weights[key].ndim != 2 or not weights[key].numel():
        raise ValueError(f"{path}: {key!r} has shape {tuple(weights[key].shape)}; expected a matrix")
    rows, columns = weights[key].shape
    return rows, columns


def _has(weights: Weights, *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in weights)


def _list_keys(keys: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """Return the number of keys, and the first three with their shapes."""
    keys = list(keys)
    shown = ", ".join(f"{key!r} {tuple(tensors[key].shape)}" for key in keys[:3])
    return f"{len(keys):,} keys, e.g. {shown}," if len(keys) > 3 else shown
