"""The sentence above the scores of a perturbation model says which method is better, as far as its two digits show."""

import pytest

from scgpt_hf.reporting.perturbation.report import _claim


@pytest.mark.parametrize(
    ("model", "baseline", "expected"),
    [
        (2.363, 2.364, "The model is as good as no change (2.36)."),
        (2.31, 2.36, "The model is better than no change (2.31 against 2.36)."),
        (2.41, 2.36, "The baseline 'no change' is better than the model (2.36 against 2.41)."),
    ],
)
def test_the_better_method_is_named(model: float, baseline: float, expected: str) -> None:
    methods = {"model": {"items": 3, "l2": model}, "no change": {"items": 3, "l2": baseline}}
    assert _claim(methods, "l2") == expected
