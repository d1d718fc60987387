"""Every folder of the parity fixtures is covered by a test."""

import json
from pathlib import Path

from tests.support.parity import CASES

# Networks that have a separate test, in test_model_parity, test_perturbation_parity and test_modality_parity.
OTHER_NETWORKS = {"generate_from_cell_emb", "perturbation_generator", "multiomic_mod_types"}
FUNCTIONS = {"binning", "losses", "tokenize", "embed_data"}


def test_all_18_networks_and_4_functions_are_tested(fixtures: Path) -> None:
    folders = {path.name for path in fixtures.iterdir() if path.is_dir()}
    assert folders == {*CASES} | OTHER_NETWORKS | FUNCTIONS
    networks = {name for name in folders if (fixtures / name / "best_model.pt").is_file()}
    assert networks == {*CASES} | OTHER_NETWORKS
    assert len(networks) == 18
    assert {name for name in json.loads((fixtures / "index.json").read_text()) if name in networks} == networks
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    assert not [name for name in OTHER_NETWORKS | FUNCTIONS if f'"{name}"' not in tests]
