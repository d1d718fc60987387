"""A Ray cluster writes the same cache as one process, even if workers are killed."""

import pytest

from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.source import open_source
from tests.support.caches import SHARD, contents, make_cells, plan_on_ray
from tests.support.ray_jobs import run_on_ray

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="Ray is not installed: pip install 'scgpt_hf[cluster]'")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The content of each file of the cache that one process writes."""
    folder = tmp_path_factory.mktemp("cache") / "one"
    write_cache(open_source(make_cells()), folder, **SHARD)
    return contents(folder)


def test_a_cluster_whose_workers_are_killed_in_the_middle_of_a_shard_writes_the_same_files(complete, tmp_path):
    # The first writes of a file; its last ones; before and behind the rename to its name; before its record is written.
    events = [1, 6, 9, 10, 11, 12, 13]
    assert "complete True" in run_on_ray(plan_on_ray, tmp_path / "many", events)
    assert (tmp_path / "events").read_text() == "", "workers were killed less often than planned"
    assert contents(tmp_path / "many") == complete


def test_workers_that_die_again_and_again_raise_an_error(tmp_path):
    printed = run_on_ray(plan_on_ray, tmp_path / "many", [1] * 100)
    assert "error RuntimeError the worker that writes a shard died 6 times" in printed


def test_an_error_of_a_shard_is_raised_unchanged_and_the_other_shards_can_be_written_later(complete, tmp_path):
    (tmp_path / "broken").touch()
    assert "error ValueError cell 8000 cannot be read" in run_on_ray(plan_on_ray, tmp_path / "many")
    (tmp_path / "broken").unlink()
    assert "complete True" in run_on_ray(plan_on_ray, tmp_path / "many")
    assert contents(tmp_path / "many") == complete
