"""Settings from the name of a config of the package, and from keywords."""

from dataclasses import asdict
from pathlib import Path

import pytest

from scgpt_hf import make_settings, parse_settings, pretrain
from scgpt_hf.training.settings_parsing import CONFIGS, find_config, settings_yaml


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_of_the_package_is_found_by_its_name(path):
    for name in (path.stem, path.stem.replace("_", "-")):
        assert find_config(name) == path


def test_the_name_of_a_config_means_its_file():
    by_name, by_file = (parse_settings([name, "--seed", "3"]) for name in ("blood-cpu", "configs/blood_cpu.yaml"))
    assert settings_yaml(by_name) == settings_yaml(by_file)
    with pytest.raises(ValueError, match=r"unknown config 'blod-cpu'; did you mean 'blood-cpu'\?; name a YAML file"):
        parse_settings(["blod-cpu"])


def test_keywords_mean_what_flags_mean():
    flags = ["blood-cpu", "--data", "a.h5ad", "b.h5ad", "--num_train_epochs", "3", "--loss_weights", '{"gep": 1.0}']
    keywords = {"data": [Path("a.h5ad"), "b.h5ad"], "num_train_epochs": 3, "loss_weights": {"gep": 1.0}}
    by_keyword, by_flag = make_settings("blood-cpu", **keywords), parse_settings(flags)
    assert asdict(by_keyword.data) == asdict(by_flag.data)
    assert by_keyword.model.loss_weights == by_flag.model.loss_weights == {"gep": 1.0}
    assert by_keyword.training.num_train_epochs == by_flag.training.num_train_epochs == 3


def test_wrong_keywords_name_the_setting():
    with pytest.raises(ValueError, match="unknown setting 'n_hgv'; did you mean 'n_hvg'"):
        make_settings(n_hgv=3)
    with pytest.raises(ValueError, match="expected a whole number for 'n_hvg', found 'many'"):
        make_settings(n_hvg="many")
    with pytest.raises(ValueError, match=r"pass \['n_hvg'\] to parse_settings or make_settings"):
        pretrain(make_settings(), n_hvg=3)
