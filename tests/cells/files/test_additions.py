"""Test that additions to a copy of a file leave everything else as it is, whatever types the file has."""

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scgpt_hf.cells.files.additions import create_rows, open_copy, write_columns, write_plainly

COLUMNS = pd.DataFrame({"type": pd.Categorical(["T", "B", "T"]), "confidence": np.array([0.5, 1, 0.25], np.float32)})


def write_file(path: Path, obs: pd.DataFrame) -> None:
    with anndata.settings.override(allow_write_nullable_strings=True):
        AnnData(np.eye(3, 2, dtype=np.float32), obs.set_axis(["a", "b", "c"]), uns={"kept": "yes"}).write_h5ad(path)


@pytest.mark.parametrize(
    "obs",
    [
        pd.DataFrame(index=range(3)),
        pd.DataFrame({"name": pd.array(["x", None, "z"], dtype="string"), "type": ["old", "B", "C"]}),
        pd.DataFrame({"n": pd.array([1, None, 3], dtype="Int64"), "ok": pd.array([True, None, False], "boolean")}),
    ],
    ids=["no columns", "nullable text", "nullable numbers"],
)
def test_columns_are_added_and_all_others_stay_as_they_are(obs: pd.DataFrame, tmp_path: Path) -> None:
    write_file(tmp_path / "cells.h5ad", obs)
    with open_copy(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", overwrite=False) as file:
        write_columns(file, COLUMNS)
    before, after = (anndata.read_h5ad(tmp_path / name) for name in ("cells.h5ad", "out.h5ad"))
    others = [name for name in before.obs if name not in COLUMNS]
    pd.testing.assert_frame_equal(after.obs[others], before.obs[others])
    assert list(after.obs) == list(dict.fromkeys([*before.obs, *COLUMNS]))
    assert after.obs["type"].tolist() == ["T", "B", "T"]
    assert after.obs["confidence"].tolist() == [0.5, 1, 0.25]
    assert after.uns["kept"] == "yes"


def test_a_file_of_anndata_0_6_gets_columns_and_embeddings(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        obs = np.array([(b"a", 1), (b"b", 2), (b"c", 3)], dtype=[("index", "S1"), ("n", "i8")])
        file["X"], file["obs"] = np.eye(3, 2, dtype=np.float32), obs
        file["var"] = np.array([(b"g",), (b"h",)], dtype=[("index", "S1")])
        file["obsm"] = np.array([([1.0, 2.0],)] * 3, dtype=[("X_pca", "f4", (2,))])
    with open_copy(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", overwrite=False) as file:
        write_columns(file, COLUMNS)
        create_rows(file, "obsm/X_scgpt", (3, 4))[:] = 1
    with pytest.warns(anndata.OldFormatWarning):  # of var
        found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.obs_names.tolist() == ["a", "b", "c"]
    assert found.obs["n"].tolist() == [1, 2, 3]
    assert found.obs["type"].tolist() == ["T", "B", "T"]
    assert found.obsm["X_pca"].tolist() == [[1, 2]] * 3
    assert (found.obsm["X_scgpt"] == np.ones((3, 4))).all()


def test_a_failure_removes_the_copy_and_keeps_what_was_there(tmp_path: Path) -> None:
    write_file(tmp_path / "cells.h5ad", pd.DataFrame(index=range(3)))
    content = (tmp_path / "cells.h5ad").read_bytes()
    with (
        pytest.raises(RuntimeError, match="stop"),
        open_copy(tmp_path / "cells.h5ad", tmp_path / "cells.h5ad", overwrite=True),
    ):
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]
    assert (tmp_path / "cells.h5ad").read_bytes() == content


def test_a_copy_that_cannot_be_renamed_is_kept(tmp_path: Path) -> None:
    write_file(tmp_path / "cells.h5ad", pd.DataFrame(index=range(3)))

    def add_while_a_folder_of_that_name_appears() -> None:
        with open_copy(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", overwrite=False) as file:
            write_columns(file, COLUMNS)
            (tmp_path / "out.h5ad").mkdir()

    with pytest.raises(OSError, match=r"complete in .*out\.unsaved-\w+\.h5ad"):
        add_while_a_folder_of_that_name_appears()
    (kept,) = tmp_path.glob("out.unsaved-*.h5ad")
    assert anndata.read_h5ad(kept).obs["type"].tolist() == ["T", "B", "T"]
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "out.h5ad", kept.name}


def test_the_later_of_two_runs_that_write_one_file_keeps_its_result_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "cells.h5ad", pd.DataFrame(index=range(3)))

    def write_while_another_run_does() -> None:
        with open_copy(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", overwrite=False) as later:
            write_columns(later, COLUMNS)
            with open_copy(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", overwrite=False) as earlier:
                write_columns(earlier, COLUMNS.assign(type=["first"] * 3))

    with pytest.raises(FileExistsError, match=r"complete in .*out\.unsaved-\w+\.h5ad"):
        write_while_another_run_does()
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs["type"].tolist() == ["first"] * 3
    (kept,) = tmp_path.glob("out.unsaved-*.h5ad")
    assert anndata.read_h5ad(kept).obs["type"].tolist() == ["T", "B", "T"]


def test_plain_files_have_all_that_was_added(tmp_path: Path) -> None:
    write_plainly(tmp_path, {"obs": COLUMNS, "obsm/X": np.eye(3), "uns/X": {"cells": 3, "path": Path("a")}})
    assert pd.read_csv(tmp_path / "obs.csv")["type"].tolist() == ["T", "B", "T"]
    assert (np.load(tmp_path / "obsm-X.npy") == np.eye(3)).all()
    assert json.loads((tmp_path / "uns-X.json").read_text()) == {"cells": 3, "path": "a"}
