"""The laws of the house: who imports whom, how long a file may be, and a docstring on every public name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scgpt_hf"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("cells", "tokens", "model", "training", "analysis")

# What a room may import of ours; the corridor and the border (stream, demo, convert) are named by file.
MAY_IMPORT = {
    "cells": {"cells"},
    "tokens": set(),
    "model": set(),
    "genes": {"cells", "tokens"},
    "pretrained": {"tokens", "model"},
    "stream": {"cells", "tokens", "genes"},
    "demo": {"cells"},
    "convert": {"tokens", "model", "convert"},
    "training": {"training", "stream", "cells", "tokens", "model", "demo", "genes", "pretrained"},
    "analysis": {"analysis", "training", "stream", "cells", "tokens", "model", "genes", "pretrained"},
    "__init__": {*ROOMS, "stream", "demo", "convert"},
}
# What travels with the weights may need nothing that a user of transformers lacks; numba only in a `try:`.
CLOSED = {"tokens": {"numpy", "torch", "transformers", "scipy"}, "model": {"torch", "transformers", "huggingface_hub"}}
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
LINES, LINES_OF_MODELING = 320, 480


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    if len(inside.parts) > 1:
        return inside.parts[0]
    return "convert" if inside.stem.startswith("convert") else inside.stem


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
def test_rooms_import_only_whom_they_may(path: Path) -> None:
    room = room_of(path)
    for level, module, _ in imports_of(path):
        if level == 0 and module.split(".")[0] == "scgpt_hf" and module != "scgpt_hf":
            assert room_of(PACKAGE.joinpath(*module.split(".")[1:])) in MAY_IMPORT[room], f"{room} imports {module}"


@pytest.mark.parametrize("room", CLOSED)
def test_closed_rooms_import_siblings_by_one_dot_and_little_else(room: str) -> None:
    siblings = {path.stem for path in (PACKAGE / room).glob("*.py")}
    for path in (PACKAGE / room).glob("*.py"):
        for level, module, tried in imports_of(path):
            if level:
                assert level == 1, f"{path.name}: from {'.' * level}{module}"
                assert module in siblings, f"{path.name}: no sibling {module}"
            elif not tried:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names | CLOSED[room], f"{path.name} imports {module}"


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


def test_file_names_of_the_closed_rooms_differ() -> None:
    names = [path.name for room in CLOSED for path in (PACKAGE / room).glob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_no_class_is_called_a_tokenizer() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ClassDef) and "Tokenizer" in node.name), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_decide(path: Path) -> None:
    text = path.read_text()
    assert path.name not in FORBIDDEN_NAMES
    assert len(text.splitlines()) <= (LINES_OF_MODELING if path.name == "modeling_scgpt.py" else LINES)
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
            assert length <= 60, f"{path.name}: {node.name} has {length} lines besides its docstring"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_main_and_nothing_else(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 80
    assert 'if __name__ == "__main__":' in text
    defined = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert "main" in defined


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
