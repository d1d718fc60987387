"""Configuration of the documentation: sphinx with the theme and the notebook reader that scverse uses."""

import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

project = "scgpt_hf"
author = "The authors of scgpt_hf"
copyright = f"2026, {author}"
release = version = version_of("scgpt_hf")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
# Lines of the shell in notebooks, which start with "!", are no Python.
suppress_warnings = ["misc.highlighting_failure"]

# The tests run the notebooks; the documentation shows their stored outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

# Docstrings are plain text with single backticks around code.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes")]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "scgpt_hf"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
html_show_sourcelink = False


def copy_pages() -> None:
    """Copy the notebooks and the results of benchmarks, which are outside of this folder, with their figures."""
    for folder, target, suffixes in (
        ("examples", "tutorials", {".ipynb"}),
        ("benchmarks", "benchmarks", {".md", ".png"}),
    ):
        shutil.rmtree(DOCS / target, ignore_errors=True)
        for path in (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes):
            copy = DOCS / target / path.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def point_links_to_copies(app: Any, page: str, source: list[str]) -> None:
    """Change links from a page to the benchmarks of the repository into links to their copies."""
    if "/" not in page:
        source[0] = source[0].replace("](../benchmarks/", "](benchmarks/")


def setup(app: Any) -> None:
    """Prepare the pages before sphinx reads them."""
    copy_pages()
    app.connect("source-read", point_links_to_copies)
