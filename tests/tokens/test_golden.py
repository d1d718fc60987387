"""Twenty handmade cells give the stored numbers, with and without numba."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from scgpt_hf.tokens import masking_scgpt, tokenizing_scgpt

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("compiled", [True, False])
def test_every_stage_gives_the_stored_numbers(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (masking_scgpt, tokenizing_scgpt):
        monkeypatch.setattr(module, "COMPILED", compiled)
    results = runpy.run_path(str(GOLDEN / "make_tokens.py"))["stages"]()
    with np.load(GOLDEN / "tokens.npz") as stored:
        assert set(stored) == set(results)
        for name, expected in stored.items():
            assert results[name].dtype == expected.dtype, name
            if name.startswith("log1p/"):  # the C library's log1p may differ in its last bit
                np.testing.assert_allclose(results[name], expected, rtol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(results[name], expected, err_msg=name)


def test_golden_files_are_small() -> None:
    assert (GOLDEN / "tokens.npz").stat().st_size <= 50_000
