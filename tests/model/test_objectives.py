"""Each objective equals a simple version; losses of parts add up; the loss is 0 if there is nothing to predict."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.model.objectives_scgpt import (
    IGNORE,
    bernoulli_nll,
    class_cross_entropy,
    contrastive_cells,
    elastic_cell_similarity,
    masked_mse,
    share_of_batch,
)

numbers = st.floats(-50, 50, width=32)
labels = st.lists(st.one_of(st.just(IGNORE), st.integers(0, 50).map(float)), max_size=12)
cells = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3), min_size=n, max_size=n)
)


def with_predictions(truth: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    predicted = torch.randn(len(truth), generator=torch.Generator().manual_seed(len(truth))) * 5
    return predicted, torch.tensor(truth)


@given(truth=labels)
def test_masked_mse_is_the_mean_over_labels(truth: list[float]) -> None:
    predicted, target = with_predictions(truth)
    errors = [(p - t) ** 2 for p, t in zip(predicted.tolist(), truth, strict=True) if t != IGNORE]
    assert masked_mse(predicted, target).item() == pytest.approx(sum(errors) / max(len(errors), 1), rel=1e-4)


@given(truth=labels)
def test_bernoulli_nll_is_the_log_probability_of_being_expressed(truth: list[float]) -> None:
    logits, target = with_predictions(truth)
    terms = []
    for logit, value in zip(logits.tolist(), truth, strict=True):
        probability = 1 / (1 + math.exp(-logit))
        if value != IGNORE:
            terms.append(-math.log(probability if value > 0 else 1 - probability))
    assert bernoulli_nll(logits, target).item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-3, abs=1e-6)


@settings(deadline=None)
@given(embedding=cells, threshold=st.floats(0, 1))
def test_elastic_cell_similarity_is_the_mean_over_all_pairs(embedding: list[list[float]], threshold: float) -> None:
    total = 0.0
    for i, first in enumerate(embedding):
        for j, second in enumerate(embedding):
            norms = max(math.hypot(*first), 1e-12) * max(math.hypot(*second), 1e-12)
            similarity = sum(a * b for a, b in zip(first, second, strict=True)) / norms
            similarity = 0.0 if i == j else max(similarity, 0.0)
            total += 1 - (similarity - threshold) ** 2
    found = elastic_cell_similarity(torch.tensor(embedding), threshold).item()
    assert found == pytest.approx(total / len(embedding) ** 2, abs=1e-4)


@settings(deadline=None)
@given(embedding=cells)
def test_contrastive_cells_is_smaller_for_the_right_partner(embedding: list[list[float]]) -> None:
    first = torch.tensor(embedding) + torch.eye(3)[torch.arange(len(embedding)) % 3] * 20
    right = contrastive_cells(first, first, 0.5).item()
    assert right <= contrastive_cells(first, first.roll(1, 0), 0.5).item() + 1e-5


def test_contrastive_cells_equals_a_worked_example() -> None:
    first, second = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    certain, undecided = (-math.log(math.exp(s) / (math.exp(s) * 2)) for s in (2.0, 0.0))
    assert contrastive_cells(first, second, 0.5).item() == pytest.approx((certain + undecided) / 2, rel=1e-5)


@given(truth=labels, cut=st.integers(0, 12))
def test_parts_of_a_batch_add_up_to_its_mean(truth: list[float], cut: int) -> None:
    predicted, target = with_predictions(truth)
    n_labels = (target != IGNORE).sum()
    for objective in (masked_mse, bernoulli_nll):
        complete = objective(predicted, target)
        parts = [objective(predicted[part], target[part], n_labels) for part in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(sum(parts), complete)
    shares = [share_of_batch(target[part], n_labels) for part in (slice(cut), slice(cut, None))]
    assert sum(shares).item() == pytest.approx(1.0 if n_labels else 0.0)


def test_the_share_of_a_complete_batch_is_1() -> None:
    assert share_of_batch(torch.full((3,), IGNORE), None) == 1
    assert masked_mse(torch.ones(2), torch.zeros(2), 4) == 0.5


def test_the_loss_is_0_if_there_is_nothing_to_predict() -> None:
    predicted, nothing = torch.randn(4, requires_grad=True), torch.full((4,), IGNORE)
    logits, unknown = torch.randn(4, 3, requires_grad=True), torch.full((4,), int(IGNORE))
    losses = [
        *(masked_mse(predicted, nothing), bernoulli_nll(predicted, nothing)),
        class_cross_entropy(logits, unknown),
        *(masked_mse(predicted[:0], nothing[:0]), class_cross_entropy(logits[:0], unknown[:0])),
        *(elastic_cell_similarity(logits[:0], 0.3), contrastive_cells(logits[:0], logits[:0], 0.5)),
    ]
    assert [loss.item() for loss in losses] == [0.0] * len(losses)
    sum(losses).backward()
    assert not predicted.grad.any()
    assert not logits.grad.any()


def test_class_cross_entropy_is_the_mean_over_known_classes() -> None:
    logits, known = torch.randn(5, 3), torch.tensor([0, int(IGNORE), 2, 1, int(IGNORE)])
    torch.testing.assert_close(class_cross_entropy(logits, known), torch.nn.functional.cross_entropy(logits, known))


def test_losses_are_float32_under_autocast() -> None:
    predicted, target = torch.randn(64).bfloat16(), torch.full((64,), 40.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_mse(predicted, target).dtype == torch.float32
        assert elastic_cell_similarity(torch.randn(4, 8).bfloat16(), 0.3).dtype == torch.float32
