"""Small models and random masked cells; needs only torch, transformers and numpy, as on a GPU machine.

Example:
    >>> batch = pack(random_cells(n_cells=24, mean_tokens=90, n_genes=N_GENES, seed=0))
    >>> loss = small_model()(**batch).loss
"""

from typing import Any

import numpy as np
import torch

from scgpt_hf.model.configuration_scgpt import OBJECTIVES, ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens

N_GENES = 1000  # of `small_model`; `<pad>` and `<cls>` have the next two ids
PAD_ID, CLS_ID = N_GENES, N_GENES + 1

# Every head, and every objective but "gen", which needs queries; batches need `domain_ids`, `class_labels` and count
# targets.
EVERY_OBJECTIVE: dict[str, Any] = {
    "n_domains": 3,
    "domain_embedding": True,
    "domain_head": True,
    "explicit_zero_prob": True,
    "loss_weights": dict.fromkeys((name for name in OBJECTIVES if name != "gen"), 1.0),
    "cls_shortcut": True,
    "shortcut_size": 8,
    "count_head_size": 8,
}


def random_cells(n_cells: int, mean_tokens: int, n_genes: int, seed: int = 0) -> Tokens:
    """Return random cells with half of the genes masked; `<cls>`, with id `n_genes` + 1, is never masked."""
    rng = np.random.default_rng(seed)
    indptr = np.cumsum([0, *np.maximum(rng.poisson(mean_tokens, n_cells), 2)])
    input_ids = rng.integers(0, n_genes, indptr[-1])
    input_ids[indptr[:-1]] = n_genes + 1
    bins = rng.integers(1, 51, indptr[-1]).astype(np.float32)
    masked = (rng.random(indptr[-1]) < 0.5) & (input_ids != n_genes + 1)
    values, labels = np.where(masked, np.float32(-1), bins), np.where(masked, bins, np.float32(IGNORE))
    return Tokens(input_ids, values, labels, indptr, np.arange(n_cells))


def random_count_targets(n_cells: int, n_genes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random raw counts of each cell as a batch carries them for the objective "counts"."""
    counts = torch.poisson(torch.full((n_cells, n_genes), 0.7), generator=torch.Generator().manual_seed(seed))
    counts[:, 0] += 1  # every cell expresses a gene
    cells, ids = counts.nonzero(as_tuple=True)
    return {"count_ids": ids, "count_values": counts[cells, ids], "count_cells": cells}


def as_views(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a batch under the keys of second views, for the objective "views"."""
    layout = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return {f"view_{name}": batch[name] for name in ("input_ids", "values", *layout) if name in batch}


def small_model(
    device: torch.device | str = "cpu", attention: str = "scgpt_varlen", **settings: Any
) -> ScGPTForPreTraining:
    """Return an untrained model of width 128; the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = ScGPTConfig(vocab_size=N_GENES + 2, pad_token_id=PAD_ID, **{**sizes, "dropout": 0.0, **settings})
    model: Any = ScGPTForPreTraining._from_config(config, attn_implementation=attention)
    network: ScGPTForPreTraining = model.to(device)
    return network


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss of a batch and a copy of the gradient of each parameter."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]
