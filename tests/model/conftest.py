"""Fixtures of the model tests: four small cells of different lengths, padded and packed, and small models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.model.objectives_scgpt import IGNORE
from tests.support.models import as_views, random_count_targets

LENGTHS = (5, 9, 1, 7)
GENES, PAD, CLS = 17, 17, 18


@pytest.fixture
def config() -> Callable[..., ScGPTConfig]:
    def make(**settings: Any) -> ScGPTConfig:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
        return ScGPTConfig(vocab_size=20, pad_token_id=PAD, **{**sizes, "dropout": 0.0, "num_labels": 3, **settings})

    return make


@pytest.fixture
def model(config: Callable[..., ScGPTConfig]) -> Callable[..., ScGPTForPreTraining]:
    def make(attention: str | None = None, **settings: Any) -> ScGPTForPreTraining:
        torch.manual_seed(0)
        return ScGPTForPreTraining._from_config(config(**settings), attn_implementation=attention)

    return make


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Four padded cells with about half of the genes masked, but never `<cls>`."""
    random = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS) + 2)
    real = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    input_ids = torch.randint(GENES, shape, generator=random)
    input_ids[:, 0] = CLS
    true = torch.randint(1, 51, shape, generator=random).float()
    masked = (torch.rand(shape, generator=random) < 0.5) & real & (input_ids != CLS)
    cells = {
        "input_ids": input_ids.masked_fill(~real, PAD),
        "values": true.masked_fill(masked, -1.0).masked_fill(~real, -2.0),
        "attention_mask": real,
        "labels": true.masked_fill(~masked, IGNORE),
        "domain_ids": torch.tensor([0, 1, 0, 2]),
        "class_labels": torch.tensor([2, 0, 1, 1]),
        **random_count_targets(len(LENGTHS), GENES),
    }
    return cells | as_views(cells)


@pytest.fixture
def packed(padded: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The cells of `padded`, packed."""
    real = padded["attention_mask"]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    cells = {
        **{name: padded[name][real][None] for name in ("input_ids", "values", "labels")},
        **{name: padded[name] for name in ("domain_ids", "class_labels", "count_ids", "count_values", "count_cells")},
        **{"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets},
        **{"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)},
    }
    return cells | as_views(cells)
