"""Whatever is malformed, the answer is our error and an untouched disk: sources, settings, records, models.

Each example damages a good input by a seeded draw and opens it the way users do. Allowed are success and an OSError
or ValueError that names what was read; anything else, and any change on disk, fails. `benchmarks/fuzz.py` runs more.
"""

import pytest

from tests.support.damage import CASES, check, make_inputs


@pytest.fixture(scope="session")
def inputs(small_cells, small_census, tmp_path_factory):
    return make_inputs(small_cells, small_census, tmp_path_factory.mktemp("inputs"))


@pytest.mark.filterwarnings("ignore")  # libraries may warn of what is damaged before we refuse it
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_input_gives_our_error_and_leaves_the_disk_alone(inputs, tmp_path, name, seed):
    check(name, inputs, tmp_path, seed)
