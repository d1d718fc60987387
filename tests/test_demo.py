"""The demo data: raw counts that are recovered exactly, with sequencing wells as donors."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.cells.source import open_source
from scgpt_hf.demo import demo_census, recover_counts


def test_the_demo_is_built_once_and_opens_as_a_census(tmp_path, caplog):
    folder = demo_census(tmp_path / "demo")
    written = (folder / "census_info").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert demo_census(folder) == folder
    assert (folder / "census_info").stat().st_mtime_ns == written
    assert "wells are used as donors" in caplog.text
    with open_source(folder, obs_filter="tissue_general == 'blood' and disease == 'normal'") as source:
        obs = source.obs(["donor_id", "cell_type"])
        counts = source.read(obs.index.to_numpy()).counts
    assert (obs["donor_id"].nunique(), obs["cell_type"].nunique()) == (8, 10)
    assert counts.shape == (700, 765)
    assert (counts.data == np.rint(counts.data)).all()
    assert np.median(counts.data) == 1


def test_processes_that_start_at_the_same_time_build_the_demo_once(tmp_path):
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from scgpt_hf.demo import demo_census
demo_census(sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "demo")]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    logs = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], logs
    assert sum(f"built {tmp_path / 'demo'}" in log for log in logs) == 1
    assert not any("earlier build" in log for log in logs)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_folder_with_other_data_raises(small_census):
    with pytest.raises(ValueError, match="has 270 cells, expected the 700 of the demo"):
        demo_census(small_census)


@given(counts=st.lists(st.integers(1, 400), min_size=1, max_size=20), unseen=st.integers(2000, 4000))
def test_recover_counts_inverts_scanpys_normalization(counts, unseen):
    row = np.array(counts, dtype=np.float64)
    total = row.sum() + unseen
    logged = np.log1p(row / total * 10_000).round(3).astype(np.float32)
    recovered = recover_counts(csr_matrix(logged[None]), np.array([total]))
    assert recovered.toarray()[0].tolist() == counts


def test_values_that_are_not_logarithms_of_counts_raise():
    with pytest.raises(ValueError, match="cannot recover raw counts: 1 of 2 log values"):
        recover_counts(csr_matrix(np.log1p([[4.0, 4.6]])), np.array([10_000.0]))
