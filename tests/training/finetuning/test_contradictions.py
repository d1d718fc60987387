"""Labels that neighbors contradict: mistakes are found, rare and overlapping types are left alone."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from scgpt_hf.training.finetuning import contradictions
from scgpt_hf.training.finetuning.contradictions import find_contradicted


def sample(sizes: list[int], distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of clusters of these sizes, (cells, 8), and classes, (cells,), in random order."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = distance * np.eye(len(sizes), 8)
    return (centres[classes] + rng.normal(size=(len(classes), 8))) * np.logspace(-1, 1, 8), classes


def test_wrong_labels_are_found_and_no_others() -> None:
    embedding, true = sample([800, 400, 300], distance=30.0)
    labels = true.copy()
    wrong = np.random.default_rng(1).permutation(len(true))[:20]
    labels[wrong] = (true[wrong] + 1) % 3
    np.testing.assert_array_equal(np.flatnonzero(find_contradicted(embedding, labels)), np.sort(wrong))


def test_all_cells_are_kept_where_types_overlap() -> None:
    embedding, classes = sample([800, 300, 300], distance=1.0)
    assert not find_contradicted(embedding, classes).any()


def test_a_rare_label_is_never_contradicted() -> None:
    embedding, classes = sample([600, 400, 10], distance=30.0)
    embedding[classes == 2] = embedding[classes == 0][:10]  # among cells of another label
    assert not find_contradicted(embedding, classes).any()


@pytest.mark.parametrize(("right", "found"), [(15, 10), (2, 0)])
def test_a_label_keeps_its_cells_if_hardly_any_would_be_left(right: int, found: int) -> None:
    embedding, true = sample([1000, 400, right], distance=30.0)
    labels = true.copy()
    labels[np.flatnonzero(true == 0)[:: 1000 // 20][: 25 - right]] = 2
    assert find_contradicted(embedding, labels).sum() == found


def test_the_share_is_that_of_scikit_learn_without_the_cell_itself() -> None:
    embedding, classes = sample([60, 40], distance=1.0)
    share = contradictions._share_of_label(embedding, classes, np.arange(100))
    for cell in (0, 17, 99):
        others = np.delete(np.arange(100), cell)
        scaled = embedding / embedding.std(axis=0)
        model = KNeighborsClassifier(15).fit(scaled[others], classes[others])
        expected = model.predict_proba(scaled[[cell]])[0, classes[cell]]
        assert share[cell] == pytest.approx(expected)


def test_neighbors_among_a_part_of_the_cells_find_the_same_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, true = sample([800, 700], distance=30.0)
    labels = true.copy()
    labels[[3, 700, 1400]] = 1 - true[[3, 700, 1400]]
    of_all = find_contradicted(embedding, labels)
    monkeypatch.setattr(contradictions, "MAX_NEIGHBOR_CELLS", 500)
    np.testing.assert_array_equal(find_contradicted(embedding, labels), of_all)
    assert of_all.sum() == 3


@pytest.mark.parametrize("n_cells", [1, 2, 15, 16])
def test_few_cells_are_all_kept(n_cells: int) -> None:
    embedding, classes = np.random.default_rng(0).normal(size=(n_cells, 4)), np.arange(n_cells) % 2
    assert not find_contradicted(embedding, classes).any()
