"""Generative training: queries attend to given tokens and themselves, and nobody attends to queries."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.model import query_attention_scgpt
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.model.query_attention_scgpt import GivenKeys, attend_to_given
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, bucket, pack, pad
from tests.support.models import CLS_ID, N_GENES, PAD_ID, loss_and_gradients, random_cells, small_model

GENERATIVE: dict[str, Any] = {
    **{"objective": "generative", "loss_weights": {"gep": 1.0, "gepc": 1.0, "gen": 1.0}},
    **{"cls_shortcut": True, "shortcut_size": 8},
}
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)
States = list[torch.Tensor]


def random_states(lengths: list[int], seed: int) -> tuple[States, GivenKeys, torch.Tensor, torch.Tensor]:
    """Return query, key and value of packed cells, their given tokens, their offsets, and who may attend to whom."""
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths, 0]).cumsum(0).int()
    queries = torch.rand(sum(lengths), generator=random) < 0.5
    queries[offsets[:-2].long()] = False
    cell = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    n_keys = torch.bincount(cell[~queries], minlength=len(lengths) + 1)
    key_offsets = torch.nn.functional.pad(n_keys.cumsum(0), (1, 0)).int()
    keys = GivenKeys(queries, (~queries).nonzero()[:, 0], key_offsets, int(n_keys.max()))
    allowed = (cell[:, None] == cell) & (~queries | torch.eye(len(cell), dtype=torch.bool))
    return list(torch.randn(3, 1, 2, sum(lengths), 4, generator=random)), keys, offsets, allowed


def output_and_gradients(attend: Any, states: States) -> States:
    leaves = [state.clone().requires_grad_() for state in states]
    attended = attend(*leaves)
    (attended * torch.linspace(-1, 1, attended.numel()).view_as(attended)).sum().backward()
    return [attended.detach(), *(leaf.grad for leaf in leaves)]


@settings(deadline=None, max_examples=30)
@given(lengths=lengths, seed=st.integers(0, 99))
def test_every_code_path_equals_attention_with_a_mask(lengths: list[int], seed: int) -> None:
    states, keys, offsets, allowed = random_states(lengths, seed)

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.softmax((query @ key.mT * 0.3).masked_fill(~allowed, -torch.inf), dim=-1) @ value

    def explicitly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, path: Any) -> torch.Tensor:
        cells = query_attention_scgpt._Cells(offsets, keys.offsets, max(lengths), keys.max_length)
        given = (state[0].index_select(1, keys.positions) for state in (key, value))
        return path(query[0], *given, key[0], value[0], keys.queries, cells, 0.3, 0.0)[None]

    expected = output_and_gradients(masked, states)
    for attend in (
        lambda *x: attend_to_given(*x, keys, offsets, max(lengths), 0.3, 0.0),
        lambda *x: explicitly(*x, query_attention_scgpt._attend_per_cell),
        lambda *x: explicitly(*x, query_attention_scgpt._attend_padded),
    ):
        found = output_and_gradients(attend, states)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_merged_attention_survives_scores_that_overflow() -> None:
    (query, key, value), keys, offsets, _ = random_states([6, 4], 3)
    found = attend_to_given(query * 1e3, key * 1e3, value, keys, offsets, 6, 1.0, 0.0)
    assert found.isfinite().all()


def test_half_precision_on_a_cpu_is_close_to_float32() -> None:
    states, keys, offsets, _ = random_states([30, 1, 57], 0)
    exact, rounded = (
        output_and_gradients(
            lambda *x: attend_to_given(*x, keys, offsets, 57, 0.3, 0.0), [state.to(dtype) for state in states]
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(other.float(), one, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cuda_kernel_equals_the_cpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _, keys, offsets, _ = random_states([30, 1, 57], 0)
    states = list(torch.randn(3, 1, 2, 88, 16))
    expected = output_and_gradients(lambda *x: attend_to_given(*x, keys, offsets, 57, 0.25, 0.0), states)
    on_gpu = GivenKeys(keys.queries.cuda(), keys.positions.cuda(), keys.offsets.cuda(), keys.max_length)
    found = output_and_gradients(
        lambda *x: attend_to_given(*x, on_gpu, offsets.cuda(), 57, 0.25, 0.0).float(),
        [state.cuda().to(dtype) for state in states],
    )
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.float().cpu(), one, atol=5e-2, rtol=5e-2)


def cells(n_cells: int = 5, seed: int = 0) -> Tokens:
    tokens = random_cells(n_cells, 12, N_GENES, seed)
    tokens.labels[tokens.indptr[:-1] + 1] = IGNORE  # a gene of each cell is given
    return tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa", "scgpt_varlen"])
@pytest.mark.parametrize("variant", [{}, {"norm_scheme": "pre"}, {"cls_shortcut": False, "attention_dropout": 0.1}])
def test_packed_padded_and_bucketed_batches_are_equal(attention: str, variant: dict[str, Any]) -> None:
    settings = {**GENERATIVE, **variant}
    reference, model = small_model(attention="eager", **settings), small_model(attention=attention, **settings)
    for network in (reference, model):
        network.eval()
    padding: dict[str, Any] = {"pad_id": PAD_ID, "pad_value": -2.0}
    padded, packed = pad(cells(), **padding, queries=True), pack(cells(), queries=True)
    expected, gradients = loss_and_gradients(reference, padded)
    for batch in (padded, packed, bucket(packed, **padding)):
        loss, found = loss_and_gradients(model, batch)
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-4)
    one, other = reference(**padded), model(**packed)
    for name in ("gep", "gepc", "cell_embedding"):
        torch.testing.assert_close(other[name], one[name], atol=1e-5, rtol=1e-4)


def given_only(tokens: Tokens) -> Tokens:
    kept = tokens.labels == IGNORE
    indptr = np.concatenate([[0], np.cumsum(kept)])[tokens.indptr]
    return Tokens(tokens.input_ids[kept], tokens.values[kept], None, indptr, tokens.cell_ids)


@pytest.mark.parametrize("settings_", [GENERATIVE, {**GENERATIVE, "value_encoder": "scaling"}], ids=["", "scaling"])
def test_queries_change_neither_the_cell_nor_each_other(settings_: dict[str, Any]) -> None:
    model = small_model(**settings_).eval()
    batch = pack(cells(), queries=True)
    output, alone = model(**batch), model.scgpt(**pack(given_only(cells())))
    torch.testing.assert_close(output.cell_embedding, alone.cell_embedding, atol=1e-5, rtol=1e-5)
    other = {**batch, "input_ids": batch["input_ids"].clone(), "values": batch["values"].clone()}
    first, *rest = batch["label_positions"].tolist()
    other["input_ids"][0, rest] = 7  # other genes are asked for
    other["values"][0, batch["label_positions"]] = 33.0  # values of queries are not read
    torch.testing.assert_close(model(**other).gep[0], output.gep[0], atol=1e-5, rtol=1e-5)
    other["input_ids"][0, first] = 7
    assert (model(**other).gep[0] - output.gep[0]).abs() > 1e-4


def test_the_second_pass_reads_the_detached_cell_embedding() -> None:
    model = small_model(**GENERATIVE).eval()
    batch = pack(cells(), queries=True)
    output = model(**batch)
    layout = {key: value for key, value in batch.items() if not key.startswith("label")}
    again = model.scgpt(**layout, input_cell_embedding=output.cell_embedding)
    asked = batch["label_positions"]
    predicted = model.expression_head(again.last_hidden_state[0, asked])[0]
    expected = (predicted - batch["labels"][0, asked]).square().mean()
    torch.testing.assert_close(output.losses["gen"], expected)
    assert "gen" not in model(**batch, second_pass=False).losses
    table = model.scgpt.shortcut.genes.weight
    (of_shortcut,) = torch.autograd.grad(output.losses["gen"], table, allow_unused=True)
    assert of_shortcut is None  # the second pass could reach it only through the cell embedding


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_nothing() -> None:
    model, batch = small_model(**GENERATIVE), pack(cells(), queries=True)
    expected, gradients = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    loss, found = loss_and_gradients(model, batch)
    torch.testing.assert_close((loss, found), (expected, gradients))


def test_a_model_trains_in_bfloat16() -> None:
    model, batch = small_model(**GENERATIVE), pack(cells(20), queries=True)
    exact, gradients = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = loss_and_gradients(model, batch)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    norms = [torch.cat([gradient.flatten() for gradient in all_]) for all_ in (gradients, found)]
    assert torch.nn.functional.cosine_similarity(*norms, dim=0) > 0.98


def test_a_loaded_model_predicts_the_same(tmp_path) -> None:
    model, batch = small_model(**GENERATIVE).eval(), pack(cells(), queries=True)
    model.save_pretrained(tmp_path)
    loaded = ScGPTForPreTraining.from_pretrained(tmp_path).eval()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # Loaded weights need not begin where torch would place them in memory, and some CPUs then sum in another order.
    for weight in loaded.parameters():
        weight.data = weight.data.clone()
    assert torch.equal(loaded(**batch).gep, model(**batch).gep)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key_positions": None}, "packed input with queries needs"),
        ({"queries": None}, "packed input with queries needs"),
        ({"max_length_k": None}, "packed input with queries needs"),
        ({"queries": torch.zeros(1, 3, dtype=torch.bool)}, r"queries \(1, 3\) and input_ids .* differ in shape"),
    ],
)
def test_incomplete_queries_raise(wrong: dict[str, Any], message: str) -> None:
    batch = pack(cells(), queries=True) | wrong
    del batch["labels"]
    with pytest.raises(ValueError, match=message):
        small_model(**GENERATIVE)(**batch)


def test_queries_need_a_generative_model_and_the_reverse() -> None:
    with pytest.raises(ValueError, match=r"this model has no queries.*objective='generative'"):
        small_model()(**pack(cells(), queries=True))
    with pytest.raises(ValueError, match=r"queries are missing.*queries=True"):
        small_model(**GENERATIVE)(**pack(cells()))
    with pytest.raises(ValueError, match="key_positions belong to packed input"):
        small_model(**GENERATIVE).scgpt(torch.full((2, 3), CLS_ID), torch.zeros(2, 3), key_positions=torch.tensor([0]))
    with pytest.raises(ValueError, match="no gene is masked"):
        pack(given_only(cells()), queries=True)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"objective": "generative", "leave_out_masked": True, "loss_weights": {"gepc": 1.0}}, "choose one"),
        ({"objective": "generative", "cell_pooling": "average"}, "cell_pooling='average' needs padded input"),
        ({"loss_weights": {"gep": 1.0, "gen": 1.0}}, "set objective='generative'"),
        ({"objective": "generative", "loss_weights": {"gepc": 1.0, "gen": 1.0}}, "a weight of 'gep'"),
        ({"objective": "masekd"}, "objective"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ScGPTConfig(vocab_size=10, pad_token_id=8, hidden_size=16, num_attention_heads=2, **settings_)
