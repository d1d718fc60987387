"""Rules of the package: what each part may import, how long a function may be, docstrings on public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "scgpt_hf"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part of the package may import. The order is that of the pipeline: no part imports a later one.
MAY_IMPORT: dict[str, set[str]] = {
    "cells": set(),
    "tokens": set(),
    "model": set(),
    "pretrained": {"tokens", "model"},
    "conversion": {"tokens", "model"},
    "demo": {"cells"},
    "pipeline": {"cells", "tokens"},
    "publishing": {"cells"},
    "training": {"cells", "tokens", "model", "pretrained", "demo", "pipeline", "publishing"},
    "analysis": {"cells", "tokens", "model", "pretrained", "pipeline"},
    "reporting": {"cells", "tokens", "model", "pretrained", "pipeline", "publishing", "training", "analysis"},
    "pretraining": {"cells", "tokens", "model", "pipeline", "publishing", "training", "reporting"},
}
EVERYTHING = {"cli", "__init__"}
# `save_pretrained` uploads these files beside the weights, so they may need nothing that a user of transformers lacks,
# except inside a `try:`.
CLOSED = {"tokens": {"numpy", "torch", "transformers", "scipy"}, "model": {"torch", "transformers", "huggingface_hub"}}
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
MOST_MODULES = 12  # in one folder
MOST_LINES = 60  # of a function, without its docstring; ruff's C901 limits how complex it is


def part_of(path: Path) -> str:
    """Return the part of the package that a file belongs to: a folder or a module of the top level."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[int, str, bool]]:
    """(relative level, module, inside a `try:`) of every import of a file."""
    tree = ast.parse(path.read_text())
    tried = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        for part in block.body
        for node in ast.walk(part)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, id(node) in tried) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", id(node) in tried))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_parts_import_only_what_they_may(path: Path) -> None:
    part = part_of(path)
    if part in EVERYTHING:
        return
    for level, module, _ in imports_of(path):
        if level == 0 and module.split(".")[0] == "scgpt_hf" and module != "scgpt_hf":
            assert module.split(".")[1] in MAY_IMPORT[part] | {part}, f"{part} imports {module}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_folders_are_small(folder: Path) -> None:
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, f"{folder.name} has {len(modules)} modules"


@pytest.mark.parametrize("part", CLOSED)
def test_closed_parts_import_siblings_by_one_dot_and_little_else(part: str) -> None:
    siblings = {path.stem for path in (PACKAGE / part).glob("*.py")}
    for path in (PACKAGE / part).glob("*.py"):
        for level, module, tried in imports_of(path):
            if level:
                assert level == 1, f"{path.name}: from {'.' * level}{module}"
                assert module in siblings, f"{path.name}: no sibling {module}"
            elif not tried:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names | CLOSED[part], f"{path.name} imports {module}"


@pytest.mark.parametrize("entry", ["tokens/processing_scgpt.py", "model/modeling_scgpt.py"])
def test_what_auto_classes_load_imports_by_itself_every_sibling_that_its_siblings_need(entry: str) -> None:
    """From a local folder, transformers 5.4 copies only the files that the loaded one names."""
    found: set[str] = set()
    wanted = {(PACKAGE / entry).stem}
    while new := wanted - found:
        found |= new
        paths = [(PACKAGE / entry).with_name(f"{name}.py") for name in new]
        wanted = {module for path in paths for level, module, _ in imports_of(path) if level}
    named = {module for level, module, _ in imports_of(PACKAGE / entry) if level}
    assert found - named == {(PACKAGE / entry).stem}


def test_file_names_of_the_closed_parts_differ() -> None:
    names = [path.name for part in CLOSED for path in (PACKAGE / part).glob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_no_class_is_called_a_tokenizer() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ClassDef) and "Tokenizer" in node.name), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_have_a_docstring_and_a_telling_name(path: Path) -> None:
    text = path.read_text()
    assert path.name not in FORBIDDEN_NAMES
    assert not text or ast.get_docstring(ast.parse(text)), "no module docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_have_docstrings_and_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text())
    members = [
        node
        for parent in ast.walk(tree)
        if isinstance(parent, ast.ClassDef) and parent.name[0] != "_"
        for node in parent.body
    ]
    for node in [*tree.body, *members]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) or ""
            length = node.end_lineno - node.lineno + 1 - len(documented.splitlines())
            assert length <= MOST_LINES, f"{path.name}: {node.name} has {length} lines besides its docstring"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_only_launch_a_command(script: Path) -> None:
    if script.name == "conformance.py":  # for developers of this package; not a command
        return
    text = script.read_text()
    assert text.splitlines()[2].startswith("from scgpt_hf.cli.")
    assert text.endswith('if __name__ == "__main__":\n    main()\n')


def test_importing_the_package_pulls_in_no_heavy_library() -> None:
    heavy = "('tiledbsoma', 'scanpy', 'matplotlib', 'datasets')"
    code = f"import sys, scgpt_hf; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_loads() -> None:
    import scgpt_hf

    for name in scgpt_hf.__all__:
        assert getattr(scgpt_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="public names"):
        scgpt_hf.no_such_name  # noqa: B018
