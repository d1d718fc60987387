"""Test the public names of the package: that they load, and that type checkers see the same ones."""

import ast
from importlib.metadata import version
from pathlib import Path

import pytest

import scgpt_hf


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
