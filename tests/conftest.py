"""Fixtures for all tests: the folder of shared data, and small synthetic cells.

This module imports pytest and the standard library only, so that `pytest -m gpu tests/gpu` runs on a machine with
little more than torch, transformers and numpy. Fixtures import what they need.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT

if TYPE_CHECKING:
    from anndata import AnnData

# Several test processes share the cores. torch and numpy read this variable when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests open arrays with TileDB's default settings, which corrupt memory now and then; see `soma/context.py`.
os.environ.setdefault("TILEDB_SM_MEM_MALLOC_TRIM", "false")
# Some tests send SIGINT to a subprocess. A job that a shell starts with `&` ignores SIGINT, and so would its children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Use the text type of pandas 3 if SCGPT_HF_INFER_STRING is set: SCGPT_HF_INFER_STRING=1 pytest tests/cells."""
    if not os.environ.get("SCGPT_HF_INFER_STRING"):
        return
    try:
        import anndata
        import pandas as pd
    except ModuleNotFoundError:  # on a machine for `tests/gpu` only
        return
    pd.options.future.infer_string = True
    anndata.settings.allow_write_nullable_strings = True  # fixtures write text, which anndata refuses by default


@pytest.fixture(scope="module", params=["object", "str"])
def text_type(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make pandas infer text as `object` or as `str`, the type of pandas 3; for `pytest.mark.usefixtures`."""
    import anndata
    import pandas as pd

    if int(pd.__version__.split(".")[0]) > 2:
        yield "str"
        return
    with (
        pd.option_context("future.infer_string", request.param == "str"),
        anndata.settings.override(allow_write_nullable_strings=True),
    ):
        yield request.param


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data/blood` and `fixtures/scgpt_parity`; tests that need it are skipped if it does not exist."""
    folder = Path(os.environ.get("SCGPT_HF_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set SCGPT_HF_SHARED to the folder that contains data/ and fixtures/")
    return folder


@pytest.fixture(scope="session")
def small_cells() -> list[AnnData]:
    """Two data sets of 160 and 140 blood cells. 170 of the 200 genes and one of the 7 donors occur in both."""
    from tests.support.synthetic import synthetic_cells

    return [
        synthetic_cells(1, range(190), 160, ["donor_1", "donor_2", "donor_3", "donor_4"], "first"),
        synthetic_cells(2, range(20, 200), 140, ["donor_4", "donor_5", "donor_6", "donor_7"], "second"),
    ]


@pytest.fixture(scope="session")
def small_census(small_cells: list[AnnData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local SOMA in the layout of the Census with the 300 cells of `small_cells`, of which 270 are primary data."""
    from scgpt_hf.cells.soma.build import build_census

    folder = tmp_path_factory.mktemp("census")
    paths = [folder / f"{name}.h5ad" for name in ("first", "second")]
    for path, cells in zip(paths, small_cells, strict=True):
        cells.write_h5ad(path)
    return build_census(paths, folder / "soma")
