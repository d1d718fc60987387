"""The networks of the parity fixtures, and how their tensors are compared with ours."""

from typing import Any

import torch

from scgpt_hf.conversion.checkpoint import UnrecordedSettings

# Folders of shared/fixtures/scgpt_parity that hold a complete network.
CASES = (
    *("base_continuous", "flash_postnorm", "flash_prenorm", "category_values", "scaling_values", "explicit_zero_prob"),
    *("batch_labels_dab", "dsbn_seed_config", "batchnorm_plain", "pool_avg", "pool_weighted", "ecs_threshold_08"),
    *("mvc_concat_query", "mvc_sum_query", "mvc_inner_product_detach"),
)


def switches_of(made: dict[str, Any]) -> UnrecordedSettings:
    """Return the settings that the files of a case do not record, from the arguments of the constructor."""
    return UnrecordedSettings(
        norm_scheme="scgpt_pre" if made.get("pre_norm") else "post",
        cell_pooling={"cls": "cls", "avg-pool": "average", "w-pool": "weighted"}[made.get("cell_emb_style", "cls")],
        gepc_detach=made.get("mvc_decoder_style", "").endswith("detach"),
        ecs_threshold=made.get("ecs_threshold", 0.3),
    )


def assert_matches(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 2e-5) -> None:
    """Assert that two tensors agree within the tolerance of the parity tests; shapes may differ by singleton axes."""
    torch.testing.assert_close(ours, theirs.view_as(ours), atol=atol, rtol=1e-4)
