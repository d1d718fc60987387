"""The files around the code are valid, and agree with the package: versions, commands, public names, pages."""

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import scgpt_hf
from scgpt_hf_cli import COMMANDS
from tests.support import ROOT

YAML_FILES = [
    *sorted((ROOT / ".github").rglob("*.yml")),
    *(ROOT / name for name in (".readthedocs.yaml", "CITATION.cff", ".pre-commit-config.yaml")),
]
# Not those that docs/conf.py copies and sphinx writes
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/how_to").glob("*.md"))]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_files_are_valid(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    if path.parent.name == "workflows":
        assert content["jobs"]
        # YAML 1.1 reads the key `on` as true.
        assert True in content
        for job in content["jobs"].values():
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
                for script in re.findall(r"\.ci/\w+", step.get("run", "")):
                    assert os.access(ROOT / script, os.X_OK)


def test_the_citation_has_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_tests_run_on_every_python_that_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert f">={matrix['python'][0]}" == project["requires-python"]
    declared = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    assert declared == matrix["python"]


def test_the_reference_lists_every_public_name_once() -> None:
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == scgpt_hf.__all__


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_commands_and_files_that_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r"scgpt-hf ([a-z][\w-]*)", text):
        assert name in COMMANDS, f"there is no command {name}"
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{target} does not exist"
    for name in re.findall(r"(?:configs/(\w+)\.yaml)", text):
        assert (ROOT / "configs" / f"{name}.yaml").is_file()


def test_every_command_has_a_launcher_and_a_line_in_the_reference() -> None:
    text = (ROOT / "docs/command_line.md").read_text()
    for name, (module, _) in COMMANDS.items():
        assert f"`{name}`" in text
        launcher = "cache_census" if module == "cache" else module.split(".")[-1]
        assert (ROOT / "scripts" / f"{launcher}.py").is_file()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 130
