"""`build_census`: the result is readable by cellxgene_census, equals the files, and is never left incomplete."""

import errno
import fcntl
import logging
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
from anndata import AnnData

from scgpt_hf.cells.soma import build
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.soma.layout import OBS_LABELS
from scgpt_hf.cells.source import open_source
from tests.support import ROOT
from tests.support.formats import write_10x_folder
from tests.support.source_contract import expected_counts


@pytest.fixture
def files(tmp_path, small_cells):
    paths = []
    for part in small_cells:
        paths.append(tmp_path / f"{part.obs['dataset_id'].iloc[0]}.h5ad")
        part.write_h5ad(paths[-1])
    return paths


def table(frame, **filters):
    return frame.read(**filters).concat().to_pandas()


@pytest.mark.filterwarnings("ignore:Transforming to str index")  # by cellxgene_census itself
def test_cellxgene_census_reads_the_result(small_census, small_cells):
    with cellxgene_census.open_soma(uri=str(small_census)) as root:
        adata = cellxgene_census.get_anndata(
            root, "homo_sapiens", obs_value_filter="dataset_id == 'second' and cell_type in ['T cell', 'B cell']"
        )
        summary = table(root["census_info"]["summary"]).set_index("label")["value"]
        datasets = table(root["census_info"]["datasets"])
    chosen = small_cells[1][small_cells[1].obs["cell_type"].isin(["T cell", "B cell"])]
    expected = expected_counts([chosen], adata.var["feature_id"].tolist())
    assert (adata.X.toarray() == expected).all()
    assert adata.obs["donor_id"].astype(str).tolist() == chosen.obs["donor_id"].tolist()
    assert (summary["total_cell_count"], summary["unique_cell_count"]) == ("300", "270")
    assert datasets["dataset_id"].tolist() == ["first", "second"]
    assert datasets["dataset_total_cell_count"].tolist() == [160, 140]


@pytest.mark.filterwarnings("ignore:Transforming to str index")  # by cellxgene_census itself
def test_cellxgene_census_reads_the_genes_that_each_file_measured(small_census, small_cells):
    with cellxgene_census.open_soma(uri=str(small_census)) as root:
        presence = cellxgene_census.get_presence_matrix(root, "homo_sapiens")
        genes = cellxgene_census.get_var(root, "homo_sapiens")["feature_id"]
    assert presence.dtype == np.uint8
    assert presence.shape == (2, 200)
    for row, part in zip(presence.toarray(), small_cells, strict=True):
        assert set(genes[row == 1]) == set(part.var_names)


def test_a_table_written_in_parts_equals_one_written_at_once(tmp_path, small_cells, monkeypatch):
    cells = small_cells[0].copy()
    grades = pd.Categorical(np.resize(["low", "high", None, "mid"], len(cells)), ["low", "mid", "never", "high"], True)
    cells.obs["grade"], cells.obs["note"] = grades, np.resize(["a", "b", None], len(cells))
    cells.obs["donor_id"] = [f"donor {number // 3}" for number in range(len(cells))]  # each part has others
    cells.write_h5ad(tmp_path / "cells.h5ad")
    tables = {}
    for rows in (1 << 22, 7):
        monkeypatch.setattr(build, "_ROWS_PER_WRITE", rows)
        folder = build_census([tmp_path / "cells.h5ad"], tmp_path / f"census_{rows}", keep_obs=["grade", "note"])
        source = open_source(str(folder), obs_filter="grade > 'low'", primary_only=False)
        tables[rows] = source.obs(source.obs_columns)
    pd.testing.assert_frame_equal(*tables.values(), check_categorical=False)
    expected = cells.obs.reset_index(drop=True)[np.asarray(grades > "low")]
    for column in ("grade", "note", "donor_id", "cell_type"):
        found = tables[7][column].astype(object)
        assert (
            found.where(found.notna(), None).tolist()
            == expected[column].astype(object).where(expected[column].notna(), None).tolist()
        )


def test_computed_columns_of_obs_and_var_equal_those_of_the_counts(small_census, small_cells):
    with soma.Experiment.open(str(small_census / "census_data" / "homo_sapiens")) as experiment:
        obs, var = table(experiment.obs), table(experiment.ms["RNA"].var)
    counts = expected_counts(small_cells, var["feature_id"].tolist())
    assert obs["raw_sum"].tolist() == counts.sum(axis=1).tolist()
    assert obs["nnz"].tolist() == (counts > 0).sum(axis=1).tolist()
    for row, cell in zip(obs.itertuples(), counts, strict=True):
        assert row.raw_mean_nnz == pytest.approx(cell[cell > 0].mean())
        assert row.raw_variance_nnz == pytest.approx(cell[cell > 0].var(ddof=1))
    assert obs["n_measured_vars"].tolist() == [190] * 160 + [180] * 140
    assert var["nnz"].tolist() == (counts > 0).sum(axis=0).tolist()
    in_file = [np.isin(var["feature_id"], part.var_names) * part.n_obs for part in small_cells]
    assert var["n_measured_obs"].tolist() == sum(in_file).tolist()


@pytest.mark.parametrize("column", OBS_LABELS)
def test_filters_match_every_dictionary_column(small_census, column):
    with soma.DataFrame.open(str(small_census / "census_data" / "homo_sapiens" / "obs")) as obs:
        first = str(table(obs, column_names=[column])[column].iloc[0])
        assert len(table(obs, value_filter=f'{column} == "{first}"')) > 0


def test_storage_options_are_those_of_the_census(small_census):
    with soma.SparseNDArray.open(
        str(small_census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw")
    ) as raw:
        storage = raw.schema_config_options()
    assert storage.capacity == 2**16
    assert (storage.cell_order, storage.tile_order, storage.allows_duplicates) == ("row-major", "row-major", True)


@pytest.mark.parametrize("cells_per_write", [7, 2048])
def test_counts_do_not_depend_on_the_size_of_a_write(tmp_path, files, small_cells, monkeypatch, cells_per_write):
    monkeypatch.setattr(build, "CELLS_PER_WRITE", cells_per_write)
    build_census(files, tmp_path / "soma")
    with soma.Experiment.open(str(tmp_path / "soma" / "census_data" / "homo_sapiens")) as experiment:
        genes = table(experiment.ms["RNA"].var)["feature_id"].tolist()
        coo = experiment.ms["RNA"].X["raw"].read().coos().concat().to_scipy()
    assert (coo.toarray() == expected_counts(small_cells, genes)).all()


def test_filled_and_dropped_columns_are_logged_and_columns_can_be_kept(tmp_path, small_cells, caplog):
    cells = small_cells[0].copy()
    del cells.obs["is_primary_data"]
    cells.obs["lane"], cells.obs["age"] = "L1", np.arange(160)
    cells.obs["disease"] = cells.obs["disease"].where(cells.obs["disease"] == "normal", None)
    cells.write_h5ad(tmp_path / "a.h5ad")
    with caplog.at_level(logging.INFO):
        build_census([tmp_path / "a.h5ad"], tmp_path / "soma", keep_obs=["age"], organism="mus_musculus")
    assert "left out: ['lane']" in caplog.text
    assert "'sex'" in caplog.text
    obs = table(soma.DataFrame.open(str(tmp_path / "soma" / "census_data" / "mus_musculus" / "obs")))
    assert obs["is_primary_data"].all()
    assert obs["age"].tolist() == list(range(160))
    assert set(obs["sex"]) == {"unknown"}
    assert set(obs["disease"]) == {"normal", "unknown"}
    with pytest.raises(ValueError, match=r"no column \['nope'\]"):
        build_census([tmp_path / "a.h5ad"], tmp_path / "other", keep_obs=["nope"])


def test_a_dataset_is_named_by_its_column_or_else_by_its_file(tmp_path, small_cells):
    cells = small_cells[0].copy()
    del cells.obs["dataset_id"]
    cells.write_h5ad(tmp_path / "mine.h5ad")
    build_census([tmp_path / "mine.h5ad"], tmp_path / "soma")
    obs = table(soma.DataFrame.open(str(tmp_path / "soma" / "census_data" / "homo_sapiens" / "obs")))
    assert set(obs["dataset_id"]) == {"mine"}
    for folder in ("s1", "s2"):
        (tmp_path / folder).mkdir()
        small_cells[0].write_h5ad(tmp_path / folder / "mine.h5ad")
    with pytest.raises(ValueError, match=r"2 files of one dataset 'first'.*s1.*s2.*set obs\['dataset_id'\]"):
        build_census([tmp_path / folder / "mine.h5ad" for folder in ("s1", "s2")], tmp_path / "other")
    with pytest.raises(ValueError, match=r"2 files of one dataset 'mine'.*pass only one; if not, rename"):
        build_census([tmp_path / "mine.h5ad"] * 2, tmp_path / "other")


def spoil_donor(cells):
    del cells.obs["donor_id"]


def spoil_one_donor(cells):
    cells.obs["donor_id"] = cells.obs["donor_id"].astype(object).where(np.arange(cells.n_obs) > 2, None)


def test_the_donors_may_have_another_name_and_files_are_named_by_their_folder(tmp_path, small_cells):
    paths = [tmp_path / folder / "outs" / "filtered.h5ad" for folder in ("s1", "s2")]
    for path, part in zip(paths, small_cells, strict=True):
        path.parent.mkdir(parents=True)
        AnnData(part.X, part.obs[["donor_id"]].rename(columns={"donor_id": "patient"}), part.var).write_h5ad(path)
    with pytest.raises(ValueError, match=r"s1/outs/filtered\.h5ad: obs has no column 'donor_id'.*--donor_key"):
        build_census(paths, tmp_path / "soma")
    for donor_key, donors in (("patient", 7), ("dataset_id", 2)):
        folder = build_census(paths, tmp_path / donor_key, donor_key=donor_key)
        obs = table(soma.DataFrame.open(str(folder / "census_data" / "homo_sapiens" / "obs")))
        assert obs["dataset_id"].tolist() == ["s1"] * 160 + ["s2"] * 140
        assert obs["donor_id"].nunique() == donors
        assert "patient" not in obs


def test_the_file_that_lacks_the_donors_is_named(tmp_path, small_cells):
    for name, part in zip(("good", "bad"), small_cells, strict=True):
        AnnData(part.X, part.obs[["donor_id"] if name == "good" else ["assay"]], part.var).write_h5ad(
            tmp_path / f"{name}.h5ad"
        )
    with pytest.raises(ValueError, match=r"/bad\.h5ad: obs has no column 'donor_id'"):
        build_census([tmp_path / "good.h5ad", tmp_path / "bad.h5ad"], tmp_path / "soma")


def test_10x_folders_are_built_with_fractional_counts_rounded(tmp_path, small_cells):
    for folder, part in zip(("s1", "s2"), small_cells, strict=True):
        write_10x_folder(part, tmp_path / folder / "filtered_feature_bc_matrix")
    paths = [tmp_path / folder / "filtered_feature_bc_matrix" for folder in ("s1", "s2")]
    part = small_cells[0].copy()
    part.X = part.X + part.X.sign() * 0.25
    part.write_h5ad(tmp_path / "part.h5ad")
    folder = build_census([*paths, tmp_path / "part.h5ad"], tmp_path / "s", donor_key="dataset_id", round_counts=True)
    with open_source(folder, primary_only=False) as source:
        assert set(source.obs(["dataset_id"])["dataset_id"]) == {"s1", "s2", "first"}
        counts = source.read(np.arange(460)).counts.toarray()
        assert (counts[:160] == counts[300:]).all()
        assert (counts[:160] == expected_counts(small_cells, source.genes["feature_id"].tolist())[:160]).all()


def spoil_counts(cells):
    cells.X = cells.X.log1p()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_donor, r"bad\.h5ad: obs has no column 'donor_id'.*its columns are \['assay'"),
        (spoil_one_donor, "3 of 160 cells have no donor_id"),
        (spoil_counts, "expected raw counts"),
    ],
)
def test_unusable_files_raise_and_leave_nothing_behind(tmp_path, small_cells, spoil, message):
    cells = small_cells[0].copy()
    spoil(cells)
    cells.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(ValueError, match=message):
        build_census([tmp_path / "bad.h5ad"], tmp_path / "soma")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.h5ad"]


def test_a_wrong_count_in_the_middle_raises_and_leaves_nothing_behind(tmp_path, small_cells, monkeypatch):
    monkeypatch.setattr("scgpt_hf.cells.files.layers.CELLS_CHECKED", 10)
    monkeypatch.setattr(build, "CELLS_PER_WRITE", 32)
    cells = small_cells[0].copy()
    cells.X.data[cells.X.indptr[150]] = 0.5
    cells.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(ValueError, match="expected raw counts"):
        build_census([tmp_path / "bad.h5ad"], tmp_path / "soma")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.h5ad"]


@pytest.mark.parametrize("limit", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_failed_write_is_reported_in_one_line_and_leaves_nothing_behind(tmp_path, files, limit):
    script = ROOT / "scripts" / "build_census.py"
    limited = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [sys.executable, "-c", limited, script, *files, "--out", tmp_path / "soma"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # the limit would truncate bytecode, too
    failed = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert f"[Errno {errno.EIO}] writing {tmp_path / 'soma'} failed" in failed.stderr
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_full_disk_raises_enospc(tmp_path, files, monkeypatch):
    def full(*_):
        raise soma.SOMAError("[TileDB::Task] Error: Cannot write to file; POSIX write error:No space left on device")

    monkeypatch.setattr(build, "_write_table", full)
    with pytest.raises(OSError, match="soma failed") as raised:
        build_census(files, tmp_path / "soma")
    assert raised.value.errno == errno.ENOSPC
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize(("free", "warned"), [(100, True), (10**9, False)])
def test_files_larger_than_the_free_space_are_reported_before_the_build(
    tmp_path, files, monkeypatch, caplog, free, warned
):
    paths = []
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: paths.append(path) or SimpleNamespace(free=free))
    with caplog.at_level(logging.WARNING):
        build_census(files, tmp_path / "deep" / "down" / "soma")
    assert paths == [tmp_path]
    assert ("may not fit" in caplog.text) == warned


def test_an_existing_folder_raises(tmp_path, files):
    with pytest.raises(FileExistsError, match="exists; choose another folder"):
        build_census(files, tmp_path)


def test_the_command_builds_a_census_and_reports_errors_in_one_line(tmp_path, files):
    script = ROOT / "scripts" / "build_census.py"
    built = subprocess.run(
        [sys.executable, script, *files, "--out", tmp_path / "soma"], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert "300" in built.stderr
    assert (tmp_path / "soma" / "census_info" / "summary").is_dir()
    with pytest.raises(SystemExit, match="soma' exists"):
        runpy.run_path(str(script))["main"]([str(path) for path in (*files, "--out", tmp_path / "soma")])


def test_a_donor_id_in_two_datasets_counts_as_two_donors(small_census):
    with soma.DataFrame.open(str(small_census / "census_info" / "summary")) as frame:
        summary = pd.Series(dict(table(frame)[["label", "value"]].itertuples(index=False)))
    assert summary["number_donors_homo_sapiens"] == "8"


def test_a_folder_that_another_process_is_building_raises_and_is_not_called_left_over(tmp_path, files, caplog):
    (tmp_path / ".census-abc123").mkdir()
    with (tmp_path / ".census.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match=r"another process is writing .*census; wait until it has finished"):
            build_census(files, tmp_path / "census")
    assert "earlier build" not in caplog.text
    assert not (tmp_path / "census").exists()


def test_a_build_does_not_replace_what_another_process_has_built(tmp_path, files, monkeypatch):
    def write_slowly(*args):
        (tmp_path / "census").mkdir()
        (tmp_path / "census" / "kept").write_text("by the other process")
        write_soma(*args)

    write_soma = build.write_soma
    monkeypatch.setattr(build, "write_soma", write_slowly)
    with pytest.raises(FileExistsError, match="another process has written"):
        build_census(files, tmp_path / "census")
    assert [path.name for path in (tmp_path / "census").iterdir()] == ["kept"]


def test_folders_of_killed_builds_are_reported(tmp_path, files, caplog):
    (tmp_path / ".census-abc123").mkdir()
    build_census(files, tmp_path / "census")
    assert "left " in caplog.text
    assert ".census-abc123" in caplog.text


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_repeated_genes_are_summed_and_missing_lengths_are_zero(tmp_path, small_cells):
    part = small_cells[0][:, :4].copy()
    part.X = np.arange(part.n_obs * 4).reshape(-1, 4) % 3
    part.var_names = ["ENSG1", "ENSG2", "ENSG1", "ENSG3"]
    part.var["feature_length"] = pd.array([500, None, 500, 700], dtype="Int64")
    part.write_h5ad(tmp_path / "part.h5ad")
    folder = build_census([tmp_path / "part.h5ad"], tmp_path / "census")
    expected = np.stack([part.X[:, 0] + part.X[:, 2], part.X[:, 1], part.X[:, 3]], axis=1)
    with soma.Experiment.open(str(folder / "census_data" / "homo_sapiens")) as experiment:
        obs, var = table(experiment.obs), table(experiment.ms["RNA"].var)
    assert var["feature_id"].tolist() == ["ENSG1", "ENSG2", "ENSG3"]
    assert var["feature_length"].tolist() == [500, 0, 700]
    assert var["n_measured_obs"].tolist() == [part.n_obs] * 3
    assert (obs["n_measured_vars"] == 3).all()
    assert obs["raw_sum"].tolist() == expected.sum(1).tolist()
    assert obs["nnz"].tolist() == (expected > 0).sum(1).tolist()
    with open_source(folder, primary_only=False) as source:
        assert (source.read(np.arange(part.n_obs)).counts.toarray() == expected).all()
