"""Damaged sources, settings, records and models raise our errors and leave the disk unchanged.

Each test damages a valid input at random, with a seed, and opens it as users do. It must succeed, or raise an OSError
or ValueError that names the file. `benchmarks/fuzz.py` runs more seeds.
"""

import pytest

from tests.support.damage import CASES, check, make_inputs


@pytest.fixture(scope="session")
def inputs(small_cells, small_census, tmp_path_factory):
    return make_inputs(small_cells, small_census, tmp_path_factory.mktemp("inputs"))


@pytest.mark.filterwarnings("ignore")  # libraries may warn about damage before we raise
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_input_raises_our_error_and_leaves_the_disk_unchanged(inputs, tmp_path, name, seed):
    check(name, inputs, tmp_path, seed)
