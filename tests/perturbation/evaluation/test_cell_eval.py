"""Our metrics are those of cell-eval2 where both have them."""

import sys

import numpy as np
import pytest

from scgpt_hf.perturbation.evaluation.cell_eval import score_with_cell_eval
from scgpt_hf.perturbation.evaluation.evaluate import Evaluation
from scgpt_hf.perturbation.evaluation.metrics import discriminate, score_delta

N_GENES = 30
ITEMS = [(f"GENE{number}", context) for context in ("one", "two") for number in range(5)]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    rng = np.random.default_rng(0)
    deltas, scores = {}, []
    truth = {item: rng.normal(size=N_GENES) for item in ITEMS}
    for number, (name, context) in enumerate(ITEMS):
        methods = {"model": truth[name, context] + 2 * rng.normal(size=N_GENES), "no change": np.zeros(N_GENES)}
        if number % 2:
            methods["ridge linear"] = rng.normal(size=N_GENES)  # does not apply to every condition
        deltas[name, context] = {"truth": truth[name, context], **methods}
        others = {one: delta for (one, where), delta in truth.items() if where == context}
        for method, delta in methods.items():
            row = score_delta(delta, truth[name, context], np.arange(5))
            row["discrimination"] = discriminate(delta, others, name)
            scores.append({"method": method, "condition": name, "context": context, **row})
    return Evaluation(["model", "no change", "ridge linear"], scores, deltas, {}, [str(n) for n in range(N_GENES)])


def test_metrics_equal_those_of_cell_eval2(evaluation: Evaluation) -> None:
    pytest.importorskip("cell_eval2", reason="needs the extra perturb")
    found = score_with_cell_eval(evaluation)
    assert len(found) == len(evaluation.scores)
    table = found.set_index(["method", "condition", "context"])
    names = {"pearson_delta": "pearson_delta", "mse": "mse_delta", "discrimination": "discrimination_l1"}
    for row in evaluation.scores:
        theirs = table.loc[row["method"], row["condition"], row["context"]]
        for ours, name in names.items():
            if row["method"] != "no change" or ours != "pearson_delta":  # a correlation with 0 is not defined
                assert row[ours] == pytest.approx(theirs[name], abs=1e-9), (row["method"], ours)


def test_without_the_extra_the_error_names_it(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cell_eval2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cell_eval2", None)
    with pytest.raises(ImportError, match=r"pip install 'scgpt_hf\[perturb\]'"):
        score_with_cell_eval(evaluation)
