"""Rules of the code: what each package may import, how long a function may be, how docstrings read."""

import ast
import re
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path
from tokenize import COMMENT

import pytest

from scgpt_hf_cli import COMMANDS
from tests.support import ROOT

PACKAGE = ROOT / "scgpt_hf"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each subpackage or top-level module may import. A part may import earlier parts only, so there are no cycles.
MAY_IMPORT: dict[str, set[str]] = {
    "file_kinds": set(),
    "measuring": set(),
    "output": set(),
    "progress_bar": set(),
    "verbosity": set(),
    "cells": {"file_kinds", "output", "progress_bar"},
    "tokens": set(),
    "model": set(),
    "scoring": {"cells", "model"},
    "packaged_models": set(),
    "pretrained": {"tokens", "model", "packaged_models"},
    "conversion": {"file_kinds", "output", "tokens", "model"},
    "demo": {"cells"},
    "pipeline": {"cells", "tokens"},
    "inference": {"progress_bar", "cells", "tokens", "model", "pipeline", "pretrained"},
    "publishing": {"cells"},
    "training": {
        *("measuring", "output", "progress_bar", "cells", "tokens", "model", "scoring", "pretrained", "demo"),
        *("pipeline", "inference", "publishing"),
    },
    "analysis": {
        *("measuring", "output", "progress_bar", "cells", "tokens", "model", "scoring", "pretrained"),
        *("packaged_models", "pipeline", "inference"),
    },
    "perturbation": {
        *("output", "progress_bar", "cells", "tokens", "model", "pretrained", "pipeline"),
        *("inference", "publishing", "training"),
    },
    "reporting": {
        *("output", "cells", "tokens", "model", "scoring", "pretrained", "pipeline"),
        *("inference", "publishing", "training", "analysis", "perturbation"),
    },
    "pretraining": {"output", "cells", "tokens", "model", "pipeline", "publishing", "training", "reporting"},
}
EVERYTHING = {"cli", "registration", "__init__"}
# `save_pretrained` uploads the files of these packages with the weights, and users load them without scgpt_hf. They may
# therefore import only what comes with transformers, and other libraries inside a `try:`.
CLOSED = {"tokens": {"numpy", "torch", "transformers"}, "model": {"torch", "transformers", "huggingface_hub"}}
# Words of earlier versions of this package that a newcomer would not understand.
PRIVATE_WORDS = re.compile(
    r"\b(the course|courses|corridors?|lanes?|soundness|refusals?|giv(e|es|ing) way|outlives?|anew|riddles?)\b",
    re.IGNORECASE,
)
UNCLEAR_START = re.compile(r"(What|Return what|Whether|That)\b")
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
MAX_MODULES = 12  # in one folder, besides commands: nobody needs to read more than one of these
MAX_LINES = 60  # of a function, without its docstring; ruff's C901 limits its complexity


def part_of(path: Path) -> str:
    """Return the subpackage or top-level module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[int, str, bool]]:
    """Return (relative level, module, inside a `try:`) of every import in a file."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        for part in block.body
        for node in ast.walk(part)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, id(node) in guarded) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", id(node) in guarded))
    return found


def docstrings_of(text: str) -> list[str]:
    """Return all docstrings of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


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
    commands = {f"{name}.py" for name, _ in COMMANDS.values()} if folder.name == "cli" else set()
    modules = [path.name for path in folder.glob("*.py") if path.name not in {"__init__.py", *commands}]
    assert len(modules) <= MAX_MODULES, f"{folder.name} has {len(modules)} modules"


@pytest.mark.parametrize("part", CLOSED)
def test_uploaded_packages_import_siblings_by_one_dot_and_little_else(part: str) -> None:
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
def test_the_loaded_module_imports_every_sibling_that_is_needed(entry: str) -> None:
    """Transformers 5.6 copies from a local folder only the files that the loaded module imports itself."""
    found: set[str] = set()
    needed = {(PACKAGE / entry).stem}
    while new := needed - found:
        found |= new
        paths = [(PACKAGE / entry).with_name(f"{name}.py") for name in new]
        needed = {module for path in paths for level, module, _ in imports_of(path) if level}
    imported = {module for level, module, _ in imports_of(PACKAGE / entry) if level}
    assert found - imported == {(PACKAGE / entry).stem}


def test_file_names_of_the_uploaded_packages_differ() -> None:
    names = [path.name for part in CLOSED for path in (PACKAGE / part).glob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_no_class_is_called_a_tokenizer() -> None:
    """The library would register such a class in a way that `AutoFeatureExtractor` cannot read."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ClassDef) and "Tokenizer" in node.name), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_have_a_docstring_and_a_specific_name(path: Path) -> None:
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
            assert length <= MAX_LINES, f"{path.name}: {node.name} has {length} lines without its docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_and_comments_use_common_terms(path: Path) -> None:
    """The first line of a docstring is a sentence that makes sense in an index of the API."""
    text = path.read_text()
    for docstring in docstrings_of(text):
        first = docstring.splitlines()[0]
        assert not UNCLEAR_START.match(first), f"{path.name}: start with a verb or a noun: {first}"
        assert first.endswith((".", "?", ":")), f"{path.name}: the first line is not a sentence: {first}"
    comments = [token.string for token in tokenize.generate_tokens(StringIO(text).readline) if token.type == COMMENT]
    words = {match[0] for prose in [*docstrings_of(text), *comments] for match in PRIVATE_WORDS.finditer(prose)}
    assert not words, f"{path.name}: replace {sorted(words)} by the term that PyTorch, scverse or Hugging Face use"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_only_launch_a_command(script: Path) -> None:
    if script.name == "conformance.py":  # a tool for developers, not a command of the package
        return
    text = script.read_text()
    assert text.splitlines()[2].startswith("from scgpt_hf.cli.")
    assert text.endswith('if __name__ == "__main__":\n    main()\n')


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_test_modules_do_not_import_each_other(path: Path) -> None:
    """Shared code belongs into tests/support; pytest would otherwise import a test module twice."""
    for _, module, _ in imports_of(path):
        assert not module.split(".")[-1].startswith("test_"), f"{path.name} imports {module}; use tests.support"


def test_gpu_tests_need_only_the_libraries_of_the_model() -> None:
    """On a GPU machine there may be little more than torch, transformers and numpy."""
    code = """
import sys
for name in ("anndata", "tiledbsoma", "tiledb", "scanpy", "numba"):
    sys.modules[name] = None  # raises ImportError if imported
import accelerate, torch
from transformers import PreTrainedModel, Trainer
by_libraries = set(sys.modules)  # old releases import pandas
import pytest
options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--collect-only", "-q", "-m", "gpu"]
options += ["-W", "ignore:Module already imported"]
assert pytest.main([*options, "tests/gpu"]) == 0
print([name for name in ("pandas", "datasets", "pyarrow") if name in sys.modules.keys() - by_libraries])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_the_package_imports_no_other_library() -> None:
    code = "import sys; before = set(sys.modules); import scgpt_hf; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert imported - sys.stdlib_module_names == {"scgpt_hf"}


def test_every_public_name_loads() -> None:
    import scgpt_hf

    for name in scgpt_hf.__all__:
        assert getattr(scgpt_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="public names"):
        scgpt_hf.no_such_name  # noqa: B018
