"""Test the public names of the package: that they load, and that type checkers see the same ones."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

import scgpt_hf
from tests.support import ROOT


def typed_imports() -> dict[str, str]:
    """Return name → module of the imports that only type checkers follow."""
    tree = ast.parse(Path(scgpt_hf.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        alias.asname or "": f"{node.module}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_see_the_names_that_load() -> None:
    assert typed_imports() == {name: getattr(scgpt_hf, name).__module__ for name in scgpt_hf.__all__}


def test_the_version_is_that_of_the_installed_package() -> None:
    assert scgpt_hf.__version__ == version("scgpt_hf")
    assert "__version__" in dir(scgpt_hf)


def test_an_unknown_name_raises_an_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = scgpt_hf.no_such_name  # type: ignore[attr-defined]


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for texts in lists for text in texts}
    names = packages_distributions()
    for path in sorted((ROOT / "scgpt_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"scgpt_hf"}:
                # scvi-tools and Ray may not be installed
                wanted = names.get(top, ["scvi-tools" if top == "scvi" else top])
                assert {name.lower().replace("_", "-") for name in wanted} & declared, f"{path.name} imports {top}"
