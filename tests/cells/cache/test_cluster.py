"""A Ray cluster writes the cache that one process writes, even where a worker is killed half-way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.source import CellSource, open_source
from tests.support import ROOT
from tests.support.caches import SHARD, contents, make_cells

pytestmark = pytest.mark.slow

# In a process of its own: Ray leaves threads and warnings behind.
ON_RAY = """
import sys
from pathlib import Path
import ray
sys.path.insert(0, sys.argv[2])
from tests.cells.cache.test_cluster import Deadly
from tests.support.caches import SHARD, make_cells
from scgpt_hf.cells.cache.cluster import write_on_ray
from scgpt_hf.cells.cache.jobs import plan_cache
from scgpt_hf.cells.source import open_source
folder, deaths = Path(sys.argv[1]), Path(sys.argv[3])
ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2]}})
source = Deadly(open_source(make_cells()), deaths)
try:
    print("whole", write_on_ray(plan_cache(source, folder, columns=["donor_id"], **SHARD)))
except (RuntimeError, ValueError) as error:
    print("error", type(error).__name__, error)
"""


class Deadly:
    """A source that kills the process reading cells 4,096 and later, as often as `deaths` has lines left."""

    def __init__(self, source: CellSource, deaths: Path) -> None:
        self.source, self.deaths = source, deaths

    def __getattr__(self, name: str):
        if name in {"source", "deaths", "__setstate__"}:
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, cell_ids, columns=()):
        left = self.deaths.read_text().splitlines()
        if left and cell_ids[0] >= 4096:
            self.deaths.write_text("\n".join(left[1:]))
            os.kill(os.getpid(), signal.SIGKILL)
        if (cell_ids == 8000).any() and self.deaths.with_name("broken").exists():
            raise ValueError("cell 8000 cannot be read")
        return self.source.read(cell_ids, columns)


def on_ray(folder: Path, deaths: int) -> str:
    (folder.parent / "deaths").write_text("once\n" * deaths)
    arguments = [str(folder), str(ROOT), str(folder.parent / "deaths")]
    done = subprocess.run([sys.executable, "-c", ON_RAY, *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_cluster_whose_workers_are_killed_writes_the_same_files(tmp_path):
    write_cache(open_source(make_cells()), tmp_path / "one", **SHARD)
    assert "whole True" in on_ray(tmp_path / "many", deaths=2)
    assert (tmp_path / "deaths").read_text() == ""
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_error_of_a_shard_is_raised_as_it_is_and_the_rest_can_be_written_later(tmp_path):
    write_cache(open_source(make_cells()), tmp_path / "one", **SHARD)
    (tmp_path / "broken").touch()
    assert "error ValueError cell 8000 cannot be read" in on_ray(tmp_path / "many", deaths=0)
    (tmp_path / "broken").unlink()
    assert "whole True" in on_ray(tmp_path / "many", deaths=0)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
