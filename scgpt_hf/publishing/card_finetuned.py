"""The model card of a fine-tuned model: what it names or brings together, from which cells, how well, its limits.

As in `card.py`, nothing is guessed: what no file of the run records is called "not recorded".
"""

from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from scgpt_hf.publishing.card import (
    LOCAL_CHECKPOINT,
    how_to_cite,
    machine,
    make_up,
    name_checkpoint,
    pairs,
    recipe,
    table,
)
from scgpt_hf.publishing.record import UNKNOWN, Record

ANNOTATE, INTEGRATE = "annotate", "integrate"
_TAGS = ["scgpt", "single-cell", "biology", "transcriptomics", "gene-expression"]
# By task: the Hub's name for what it does, a tag, the results for the Hub: key of the summary, kind, name.
_METADATA = {
    ANNOTATE: (
        "tabular-classification",
        "cell-type-annotation",
        {"validation.macro_f1": ("f1", "macro-F1"), "validation.accuracy": ("accuracy", "accuracy")},
    ),
    INTEGRATE: (
        "feature-extraction",
        "batch-integration",
        {f"best.eval_{name}_mse": ("mse", f"{name.upper()} MSE, bins squared") for name in ("gep", "gepc")},
    ),
}


def finetuned_card(run: Path, repo_id: str | None = None) -> ModelCard:
    """Return the card of a run of `scripts/finetune.py`.

    Args:
        run: the run folder, with summary.json and settings.yaml.
        repo_id: where the checkpoint will be found; `best_model`, next to the card, when not given.

    Raises:
        ValueError: a file is malformed, or the task is none that is known; the message names file and key.
    """
    summary, settings = Record(run / "summary.json"), Record(run / "settings.yaml")
    task = summary.text("task")
    if task not in _METADATA:
        raise ValueError(f"summary.json: expected one of {list(_METADATA)} at 'task', found {task!r}")
    title = repo_id.split("/")[-1] if repo_id else run.resolve().name
    sections = _of_classifier(summary, settings) if task == ANNOTATE else _of_integration(summary, settings)
    parts = [f"# {title}", *sections, how_to_cite(summary)]
    text = f"---\n{_metadata(summary, task, title).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    return ModelCard(name_checkpoint(text, repo_id) if repo_id else text)


def _metadata(summary: Record, task: str, title: str) -> ModelCardData:
    pipeline, tag, results = _METADATA[task]
    census, base = summary.get("data.census_version", str), summary.text("model")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=[*_TAGS, tag],
        base_model=base if _is_of_the_hub(base) else None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=pipeline,
                task_name=f"{tag.replace('-', ' ')}, held-out cells",
                dataset_type="custom",
                dataset_name=_source(summary),
                dataset_revision=census,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for key, (kind, name) in results.items()
            if (value := summary.get(key, (int, float))) is not None
        ]
        or None,
        license="cc-by-4.0" if census else "other",
        license_name=None if census else "see-the-sources",
    )


def _is_of_the_hub(name: str) -> bool:
    """Return whether a model's name is OWNER/NAME, and no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def _source(summary: Record) -> str:
    if census := summary.get("data.census_version", str):
        return f"CELLxGENE Census {census}"
    return ", ".join(map(str, summary.get("data.paths", list) or [])) or summary.text("data.uri")


def _data(summary: Record, rows: dict[str, str]) -> str:
    """Return the section on the cells; `rows` stand behind source, organism, filter, and before the licence."""
    obs_filter, census = summary.get("data.obs_filter", str), summary.get("data.census_version", str)
    told = {
        "Source": _source(summary),
        "Organism": summary.text("data.organism").replace("_", " ").capitalize(),
        "Filter": f"`{obs_filter}`" if obs_filter else "none",
        **rows,
        **make_up(summary),
        "Genes": f"{summary.number('genes')}, those of the model it started from",
        "Gene hash of the source": summary.text("data.gene_hash"),
        "Licence of the data": "CC BY 4.0, as all of the Census" if census else "see the sources",
        "Licence of this repository": "weights: of the data, and of the model it started from; code Apache-2.0",
    }
    return f"## Data\n\n{table(told)}\n\n`split.json` names the cells of each part."


def _training(summary: Record, settings: Record, rows: dict[str, str]) -> str:
    told = {
        "Started from": f"`{summary.text('model')}`",
        **rows,
        "Steps": f"{summary.number('steps')}, each of {settings.number('batch_size')} cells; "
        f"{summary.number('epochs', '.3g')} epochs",
        **recipe(summary, settings.number("learning_rate", "g")),
        **machine(summary, "seconds", "validation"),
        "Software": pairs(summary.get("versions", dict)),
    }
    return f"## Training\n\n{table(told)}\n\n`settings.yaml` holds every setting of `scripts/finetune.py`."


def _of_classifier(summary: Record, settings: Record) -> list[str]:
    """Return the sections on a classifier of cell types."""
    label = summary.text("labels_key")
    held_out, left_out = summary.text("held_out"), summary.get("left_out", dict) or {}
    what = f"Names the `{label}` of single cells, with a calibrated confidence: a class head on a pretrained encoder."
    cells = {
        **{
            name: f"{summary.number(f'{part}_cells')} cells"
            + (f" of {donors:,} donors" if (donors := summary.get(f"{part}_donors", int)) else "")
            for name, part in (("Learned from", "train"), ("Held out", "validation"))
        },
        "Kept together": "nothing: single cells were held out" if held_out == "cells" else f"`{held_out}`",
        "Left out": pairs({f"{why}:": number for why, number in left_out.items() if number}).replace(UNKNOWN, "none"),
    }
    trained = {
        "What was trained": {"head": "the class head", "lora": "class head, and low-rank changes of the encoder"}.get(
            summary.text("train"), "every weight"
        )
        + f", {summary.number('trained_parameters')} parameters",
    }
    sections = [what, _LOAD_CLASSIFIER, _data(summary, cells), _training(summary, settings, trained)]
    return [*sections, _scores(summary), _LIMITS_OF_CLASSIFIER]


def _scores(summary: Record) -> str:
    """Return the section on the held-out cells: beside naming the most frequent label, and label by label."""
    rows = "\n".join(
        f"| {name} | {summary.number(f'{key}.macro_f1', '.3f')} | {summary.number(f'{key}.accuracy', '.3f')} |"
        for name, key in (
            ("this model", "validation"),
            (f"always {summary.text('majority_baseline.label')}", "majority_baseline"),
        )
    )
    return f"""## Results

On the held-out cells:

| | macro-F1 | accuracy |
| --- | --- | --- |
{rows}

Expected calibration error: {summary.number("calibration_error.after", ".3f")}.

| label | learned from | held out | of these found | right where named |
| --- | --- | --- | --- | --- |
{_label_by_label(summary)}"""


def _label_by_label(summary: Record) -> str:
    labels = summary.get("labels", dict) or {}
    confusion = np.array(summary.get("confusion.counts", list) or np.zeros((len(labels), len(labels))), dtype=np.int64)
    if confusion.shape != (len(labels), len(labels)):
        raise ValueError(f"summary.json: expected a square of {len(labels)} labels at 'confusion.counts'")
    right, held_out, named = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return "\n".join(
        f"| {label.replace('|', chr(92) + '|')} | {labels[label]['train']:,} | {held_out[i]:,} | "
        f"{_share(right[i], held_out[i])} | {_share(right[i], named[i])} |"
        for i, label in enumerate(labels)
    )


def _share(part: Any, whole: Any) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _of_integration(summary: Record, settings: Record) -> list[str]:
    """Return the sections on a model that brings experimental batches together."""
    key = summary.text("batch_key")
    what = f"Embeds single cells of several experimental batches (`{key}`) so that cells of one type lie together."
    domains = summary.get("domains", dict) or {}
    named = ", ".join(f"{domain} ({sum(parts.values()):,})" for domain, parts in domains.items())
    cells = {
        "Learned from": f"{summary.number('train_cells')} cells",
        "Held out": f"{summary.number('validation_cells')} cells, of each batch some",
        "Batches, with their cells": named or UNKNOWN,
    }
    weights = {name: settings.get(f"{name}_weight", (int, float)) for name in ("gep", "gepc", "ecs", "dar")}
    objectives = {"Objectives and weights": pairs({name: value for name, value in weights.items() if value})}
    rows = "\n".join(
        f"| {name} | {summary.number(f'best.{metric}', '.2f')} |"
        for name, metric in (
            ("model, from the cell's visible genes (GEP)", "eval_gep_mse"),
            ("model, from the cell embedding alone (GEPC)", "eval_gepc_mse"),
            ("mean of each gene over training cells", "eval_gene_mean_mse"),
            ("one constant", "eval_constant_mse"),
        )
    )
    results = f"""## Results

Hidden genes of held-out cells, in bins squared. How well batches mix and types stay apart is not among what a run
measures: ask `scripts/evaluate.py`.

| prediction | mean squared error |
| --- | --- |
{rows}"""
    load = _LOAD_INTEGRATION.replace("{key}", key)
    limits = _LIMITS_OF_INTEGRATION.replace("{key}", key)
    return [what, load, _data(summary, cells), _training(summary, settings, objectives), results, limits]


_LOAD_CLASSIFIER = f"""## How to load

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModelForSequenceClassification as Classifier, AutoProcessor
processor, model = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}"), Classifier.from_pretrained("{LOCAL_CHECKPOINT}")
adata = sc.read_h5ad("cells.h5ad")  # raw counts
scgpt_hf.predict_cell_types(adata, model, processor)  # obs["predicted_cell_type"], and its confidence
```

Without the package, transformers 5.4 or newer and the code that travels with the weights give the logits of some
hundred cells at a time:

```python
import scanpy as sc, torch
from transformers import AutoModelForSequenceClassification as Classifier, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
model = Classifier.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
with torch.no_grad(): logits = model(**processor(sc.read_h5ad("cells.h5ad")[:100])).logits  # model.config.id2label
```"""

_LIMITS_OF_CLASSIFIER = """## Intended use

A first guess at the labels of cells like those it learned from, for a person to look at beside marker genes; the
confidence says which to look at first. Input: raw counts of the same organism.

## Limits

- Not for diagnosis, nor for any decision about a person.
- It knows only the labels above, as its data used them: a cell of another type gets one of them, or "unassigned"
  where the confidence is low.
- The held-out cells also chose the epoch and set the confidence: expect somewhat less on other donors, and much less on
  other tissues, assays and states.
- Labels of few cells are learned poorly: see the table.
- Compare with logistic regression on variable genes, which is hard to beat, before relying on it."""

_LOAD_INTEGRATION = f"""## How to load

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModel, AutoProcessor
processor, model = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}"), AutoModel.from_pretrained("{LOCAL_CHECKPOINT}")
adata = sc.read_h5ad("cells.h5ad")  # raw counts, and obs["{{key}}"]
scgpt_hf.embed_anndata(adata, model, processor)  # adata.obsm["X_scgpt"]: (cells, hidden)
```"""

_LIMITS_OF_INTEGRATION = """## Intended use

One embedding for cells of the batches above, to cluster, draw and compare them together. Input: raw counts, and the
batch of each cell.

## Limits

- Not for diagnosis, nor for any decision about a person.
- It embeds only cells of the batches above, told by obs["{key}"]; for others fine-tune anew.
- What differs between batches may be biology: bringing them together can hide it.
- Compare with a simple method (variable genes and PCA) on your own data before relying on it."""
