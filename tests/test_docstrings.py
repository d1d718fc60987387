"""The examples in the docstrings of public names run, with the model of the demo in `runs/demo/best_model`.

The model has the sizes of the demo but is not trained: no example depends on its weights.
"""

import doctest
import inspect
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import transformers
from scipy.sparse import csr_matrix

import scgpt_hf

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
# Names that need no example: types whose fields are documented, and functions of arrays that another function returns.
WITHOUT_EXAMPLE = {
    *("CellSource", "ScGPTConfig", "ScGPTTrainer", "StreamConfig", "AnnotateSettings", "IntegrateSettings"),
    "PerturbationSettings",
    *("attention_maps", "mean_attention", "gene_programs"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that examples name."""
    folder = tmp_path_factory.mktemp("examples")
    cells = scgpt_hf.demo_cells()
    cells.write_h5ad(folder / "cells.h5ad")
    processor = scgpt_hf.ScGPTProcessor.from_genes(list(cells.var_names))
    config = {"vocab_size": processor.vocab_size, "pad_token_id": processor.pad_id, **SIZES}
    for name, model_class in (
        ("demo", scgpt_hf.ScGPTForPreTraining),
        ("types", scgpt_hf.ScGPTForSequenceClassification),
    ):
        for part in (model_class(scgpt_hf.ScGPTConfig(**config)), processor):
            part.save_pretrained(folder / "runs" / name / "best_model")
    return folder


def namespace(folder: Path, name: str) -> dict[str, Any]:
    """Return what examples use without defining it."""
    run = folder / "runs" / ("types" if name == "ScGPTForSequenceClassification" else "demo") / "best_model"
    model_class = transformers.AutoModelForSequenceClassification if "types" in run.parts else transformers.AutoModel
    cells = scgpt_hf.demo_cells()
    return {
        **{name: getattr(scgpt_hf, name) for name in scgpt_hf.__all__},
        **{name: getattr(transformers, name) for name in ("AutoModel", "AutoModelForPreTraining", "AutoProcessor")},
        **{"np": np, "pd": pd, "csr_matrix": csr_matrix, "logging": logging, "path": run},
        **{"adata": cells, "query": cells[:300].copy(), "reference": cells[300:].copy()},
        "source": scgpt_hf.open_source(cells),
        "model": model_class.from_pretrained(run),
        "processor": transformers.AutoProcessor.from_pretrained(run),
    }


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """Undo what the example of `set_verbosity` does."""
    package = logging.getLogger("scgpt_hf")
    level, handlers = package.level, package.handlers[:]
    yield
    package.setLevel(level)
    package.handlers[:] = handlers


@pytest.mark.parametrize("name", scgpt_hf.__all__)
def test_the_examples_of_a_public_name_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = getattr(scgpt_hf, name)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(public, name) if test.examples]
    if name in WITHOUT_EXAMPLE:
        return
    assert tests, f"{name} has no example"
    monkeypatch.chdir(folder)
    known = {**vars(inspect.getmodule(public) or public)}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        if all(example.options.get(doctest.SKIP) for example in test.examples):
            continue
        test.globs = known | namespace(folder, name)
        assert runner.run(test).failed == 0, f"{test.name} of {os.path.relpath(test.filename or '')}"
