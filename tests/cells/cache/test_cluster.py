"""A Ray cluster writes the same cache as one process, even if workers are killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.source import open_source
from tests.support import ROOT
from tests.support.caches import SHARD, contents, make_cells

pytestmark = pytest.mark.slow

# Runs in another process, because Ray leaves threads and warnings behind.
ON_RAY = """
import sys
from pathlib import Path
import ray
sys.path.insert(0, sys.argv[2])
from tests.support.caches import SHARD, DeadlySource, make_cells
from scgpt_hf.cells.cache.cluster import write_on_ray
from scgpt_hf.cells.cache.jobs import plan_cache
from scgpt_hf.cells.source import open_source
from scgpt_hf.cli.process import tune_process
folder, deaths = Path(sys.argv[1]), Path(sys.argv[3])
ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2]}})
source = DeadlySource(open_source(make_cells()), deaths)
try:
    jobs = plan_cache(source, folder, columns=["donor_id"], **SHARD)
    print("complete", write_on_ray(jobs, set_up=tune_process))
except (RuntimeError, ValueError) as error:
    print("error", type(error).__name__, error)
"""


def write_on_ray(folder: Path, deaths: int) -> str:
    """Write a cache on a cluster of which workers die; return what the process printed."""
    (folder.parent / "deaths").write_text("once\n" * deaths)
    arguments = [str(folder), str(ROOT), str(folder.parent / "deaths")]
    done = subprocess.run([sys.executable, "-c", ON_RAY, *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_cluster_whose_workers_are_killed_writes_the_same_files(tmp_path):
    write_cache(open_source(make_cells()), tmp_path / "one", **SHARD)
    assert "complete True" in write_on_ray(tmp_path / "many", deaths=2)
    assert (tmp_path / "deaths").read_text() == ""
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_error_of_a_shard_is_raised_unchanged_and_the_other_shards_can_be_written_later(tmp_path):
    write_cache(open_source(make_cells()), tmp_path / "one", **SHARD)
    (tmp_path / "broken").touch()
    assert "error ValueError cell 8000 cannot be read" in write_on_ray(tmp_path / "many", deaths=0)
    (tmp_path / "broken").unlink()
    assert "complete True" in write_on_ray(tmp_path / "many", deaths=0)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
