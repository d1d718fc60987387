"""What a model is trained on: hidden names, made-up doubles, and how much an unknown perturbation is expected to do."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.perturbation.batches import nameless_id
from scgpt_hf.perturbation.cells import ScreenColumns, read_screen
from scgpt_hf.perturbation.conditions import parse_condition
from scgpt_hf.perturbation.finetune import make_model
from scgpt_hf.perturbation.gene_names import match_screen_genes
from scgpt_hf.perturbation.settings import PerturbationSettings
from scgpt_hf.perturbation.splits import split_conditions
from scgpt_hf.perturbation.stream import ExampleStream, TrainingCells, unknown_share_of
from tests.support.screens import build_screen


def make_stream(**changes: Any) -> ExampleStream:
    screen = read_screen(build_screen(), ScreenColumns(batch_key="replicate"))
    chosen = PerturbationSettings(out="unused", hidden_size=8, num_attention_heads=2, max_tokens=30, **changes)
    split = split_conditions(sorted({name for name, _ in screen.items}), "none", validation_fraction=0)
    model, processor, _ = make_model(screen, split, screen.controls, chosen)
    cells = TrainingCells.of(screen, match_screen_genes(screen.genes, processor), split.train, screen.controls)
    return ExampleStream(cells, processor, model.config, chosen)


def examples(stream: ExampleStream, n_epochs: int = 3) -> list[Any]:
    """Return the examples of some epochs, with the position of the condition of each."""
    found = []
    for epoch in range(n_epochs):
        cells, items = stream._plan(epoch)
        before = np.ones((len(cells), 24), np.float32)
        for cell, item in zip(cells, items, strict=True):
            found.append((item, stream._example(cell, item, before[0], before[0], epoch=epoch)))
    return found


def test_labels_are_the_value_plus_the_delta() -> None:
    stream = make_stream(hide_names=0.0, made_up_doubles=0.0)
    for item, example in examples(stream):
        name = stream.cells.items[item]
        targets = stream.cells.genes.target_ids(parse_condition(name[0]))
        assert sorted(example.targets) == sorted(targets)
        np.testing.assert_allclose(example.labels - 1, stream.cells.deltas[name], atol=1e-5)


def test_made_up_doubles_have_the_sum_of_two_deltas() -> None:
    stream = make_stream(hide_names=0.0, made_up_doubles=0.999)
    singles = {
        int(stream.cells.genes.target_ids(parse_condition(name))[0]): delta
        for (name, _), delta in stream.cells.deltas.items()
        if name.endswith("+ctrl")
    }
    made_up = [example for item, example in examples(stream) if stream.cells.items[item][0].endswith("+ctrl")]
    doubles = [example for example in made_up if len(example.targets) == 2]
    assert len(doubles) > 0.9 * len(made_up)
    for example in doubles:
        expected = sum(singles[int(gene)] for gene in example.targets)
        np.testing.assert_allclose(example.labels - 1, expected, atol=1e-5)


def test_a_hidden_name_has_the_share_of_the_delta_that_an_unknown_one_has() -> None:
    stream = make_stream(hide_names=0.999, made_up_doubles=0.0)
    nameless = nameless_id(stream.processor)
    hidden = [(item, example) for item, example in examples(stream) if nameless in example.targets]
    assert len(hidden) > 100
    share = stream.cells.unknown_share[""]
    for item, example in hidden:
        assert example.targets.tolist() == [nameless]
        delta = stream.cells.deltas[stream.cells.items[item]]
        np.testing.assert_allclose(example.labels - 1, share * delta, atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 50), st.floats(0, 1))
def test_the_unknown_share_is_the_best_one(seed: int, common: float) -> None:
    rng = np.random.default_rng(seed)
    deltas = common * rng.normal(size=9) + (1 - common) * rng.normal(size=(5, 9))
    found = unknown_share_of(list(deltas))
    others = [np.delete(deltas, one, axis=0).mean(axis=0) for one in range(5)]

    def error(share: float) -> float:
        return float(np.square(deltas - share * np.stack(others)).sum())

    assert error(found) <= min(error(share) for share in np.linspace(0, 1, 101)) + 1e-9


@pytest.mark.parametrize(("deltas", "share"), [([np.ones(3)] * 4, 1.0), ([np.ones(3), -np.ones(3)], 0.0)])
def test_equal_effects_share_all_and_opposite_ones_nothing(deltas: list[np.ndarray], share: float) -> None:
    assert unknown_share_of(deltas) == pytest.approx(share)
