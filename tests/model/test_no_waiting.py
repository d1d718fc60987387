"""A training step never makes the host wait for the device, and the heads run on masked positions only.

Fake tensors have shapes but no values. Code that would wait for a value of the GPU raises an error on them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from scgpt_hf.model import attention_scgpt
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from tests.support.models import EVERY_OBJECTIVE, as_views

VARIANTS = [
    EVERY_OBJECTIVE,
    {"norm_scheme": "pre", "gepc_query": "concat", "value_encoder": "category"},
    {"norm_scheme": "scgpt_pre", "gepc_query": "sum", "value_encoder": "scaling"},
]


def test_heads_read_masked_positions_only(model: Callable[..., ScGPTForPreTraining], packed: dict[str, Any]) -> None:
    network, inputs = model(), {}
    for head in (network.expression_head.value, network.cell_to_gene_head.query):
        head.register_forward_pre_hook(lambda head, passed: inputs.update({type(head).__name__: passed}))
    positions = (packed["labels"] != -100).flatten().nonzero()[:, 0]
    output = network(**packed, label_positions=positions)
    assert torch.equal(inputs["Sequential"][0], output.last_hidden_state[0, positions])
    assert len(inputs["Linear"][0]) == len(output.gep) == len(output.gepc) == len(positions)


@pytest.mark.parametrize("path", ["_attend_with_varlen_kernel", "_attend_padded"])
@pytest.mark.parametrize("variant", VARIANTS, ids=["every_objective", "pre", "scgpt_pre"])
def test_a_training_step_needs_no_value_from_the_device(
    model: Callable[..., ScGPTForPreTraining], monkeypatch: pytest.MonkeyPatch, path: str, variant: dict[str, Any]
) -> None:
    attend = getattr(attention_scgpt, path)

    def attend_as_on_a_gpu(*states: Any) -> torch.Tensor:  # the kernel takes no dropout
        return attend(*states[:5]) if path == "_attend_with_varlen_kernel" else attend(*states)

    monkeypatch.setattr(attention_scgpt, "_attend_per_cell", attend_as_on_a_gpu)
    with FakeTensorMode():
        network = model(**variant)
        offsets = torch.empty(5, dtype=torch.int32)
        batch = {
            **{"input_ids": torch.zeros(1, 64, dtype=torch.int64), "values": torch.zeros(1, 64)},
            **{"labels": torch.zeros(1, 64), "label_positions": torch.zeros(16, dtype=torch.int64)},
            **{"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 32, "max_length_k": 32},
            **{"domain_ids": torch.zeros(4, dtype=torch.int64), "class_labels": torch.zeros(4, dtype=torch.int64)},
            **{name: torch.zeros(30, dtype=torch.int64) for name in ("count_ids", "count_cells")},
            **{"count_values": torch.zeros(30), "num_items_in_batch": torch.zeros(())},
        }
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        output = network(**batch, **as_views(batch))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    assert output.gep.shape == (16,)
    assert output.last_hidden_state.shape == (1, 64, 16)


def test_fake_tensors_detect_a_wait(model: Callable[..., ScGPTForPreTraining]) -> None:
    with FakeTensorMode():
        network, offsets = model(), torch.empty(5, dtype=torch.int32)
        ids = torch.zeros(1, 64, dtype=torch.int64)
        lengths = {"max_length_q": 32, "max_length_k": 32}
        with pytest.raises(DataDependentOutputException):  # the CPU's loop over cells needs their lengths
            network(ids, torch.zeros(1, 64), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, **lengths)
