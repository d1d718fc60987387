"""Every TileDB context of the package has the settings of `context.py`."""

from pathlib import Path

import pytest
import tiledbsoma as soma
from anndata import AnnData

from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.soma.context import TILEDB_CONFIG
from scgpt_hf.cells.source import open_source


def test_every_soma_object_is_opened_with_our_settings(
    tmp_path: Path, small_cells: list[AnnData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TileDB's default a query returns memory to the system, which corrupts memory now and then."""
    opened, others = [], []

    def record(call):
        def recorded(*args, context=None, **settings):
            opened.append(args[0])
            if context is None or not TILEDB_CONFIG.items() <= context.tiledb_config.items():
                others.append(args[0])
            return call(*args, context=context, **settings)

        return recorded

    for kind in (soma.Experiment, soma.Collection, soma.DataFrame, soma.SparseNDArray):
        for name in ("open", "create"):
            monkeypatch.setattr(kind, name, record(getattr(kind, name)))
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    with open_source(build_census([tmp_path / "cells.h5ad"], tmp_path / "soma")) as source:
        source.read(source.obs().index.to_numpy()[:5], ["donor_id"])
    assert {"homo_sapiens", "obs", "var", "raw"} <= {uri.rsplit("/", 1)[-1] for uri in opened}
    assert others == []
