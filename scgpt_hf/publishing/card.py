"""The model card of a run: data, training, results beside their baselines, use, limits, how to load and cite.

Nothing is guessed: what no file of the run records is called "not recorded". Where the card goes, `hub.py` decides.
"""

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from scgpt_hf.publishing.record import UNKNOWN, Record, composition

# How a card names its own checkpoint until it is published; `name_checkpoint` puts the repository there.
LOCAL_CHECKPOINT = "best_model"
_ERRORS = {
    "model, from the cell's visible genes (GEP)": "eval_gep_mse",
    "model, from the cell embedding alone (GEPC)": "eval_gepc_mse",
    "mean of each gene over training cells": "eval_gene_mean_mse",
    "one constant": "eval_constant_mse",
    "a perfect prediction up to tie noise (tie floor)": "eval_tie_floor_mse",
}
_RESULTS = {
    "eval_gep_mse": ("mse", "GEP MSE, bins squared"),
    "eval_gepc_mse": ("mse", "GEPC MSE, bins squared"),
    "eval_variance_explained": ("explained_variance", "share of the variance explained, against a constant"),
}


def model_card(run: Path, repo_id: str | None = None, weights: str = LOCAL_CHECKPOINT) -> ModelCard:
    """Return the card of a pretraining run; that of a fine-tuned model is in `card_finetuned.py`.

    Args:
        run: the run folder, with any of settings.yaml, split.json, summary.json, metrics.jsonl, loss.png, umap.png.
        repo_id: where the checkpoint will be found; `best_model`, next to the card, when not given.
        weights: folder within the run with config.json and processor_config.json of the checkpoint.

    Raises:
        ValueError: a file is malformed; the message names the file and the key.
    """
    settings, split = Record(run / "settings.yaml"), Record(run / "split.json")
    summary = complete_summary(Record(run / "summary.json"), split, run / "metrics.jsonl")
    title = repo_id.split("/")[-1] if repo_id else run.resolve().name
    sections = [
        f"# {title}\n\n{_WHAT}",
        _how_to_load(Record(run / weights / "processor_config.json"), settings),
        _data(summary, settings),
        _training(summary, settings, Record(run / weights / "config.json")),
        _results(summary, [name for name in ("loss.png", "umap.png") if (run / name).is_file()]),
        _USE_AND_LIMITS,
        how_to_cite(summary),
    ]
    if split.content and summary.get("steps", int) is None:
        sections = [f"{sections[0]}\n\n{_GOES_ON}", *map(_without_gaps, sections[1:])]
    text = f"---\n{_metadata(summary, settings, title).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    return ModelCard(name_checkpoint(text, repo_id) if repo_id else text)


def _without_gaps(section: str) -> str:
    """Return the section without what is not known yet: rows of tables, and what else stands in a line of its own."""
    return "\n".join(line for line in section.splitlines() if UNKNOWN not in line)


def name_checkpoint(card: str, repo_id: str) -> str:
    """Return the text of a card whose lines of code load the checkpoint from a repository."""
    return card.replace(f'from_pretrained("{LOCAL_CHECKPOINT}"', f'from_pretrained("{repo_id}"')


def complete_summary(summary: Record, split: Record, metrics: Path) -> Record:
    """Return the summary; what it lacks while training goes on comes from the split and the metrics."""
    if not summary.get("data", dict):
        summary.content["data"] = split.get("source", dict) or {}
    best = summary.get("best", dict) or _best_validation(metrics)
    baselines = summary.get("baselines", dict) or {}
    summary.content["best"] = {f"eval_{name}": value for name, value in baselines.items()} | best
    donors = {part: split.get(f"parts.{part}.donors", list) for part in ("train", "validation")}
    known: dict[str, Any] = {f"{part}_donors": len(names) for part, names in donors.items() if names}
    known |= {f"{part}_cells": split.get(f"parts.{part}.n_cells", int) for part in donors}
    known["genes"] = len(split.get("source.genes", list) or []) or None
    known["composition"] = split.get("source.composition", dict)
    for name, value in known.items():
        if summary.content.get(name) is None:
            summary.content[name] = value
    return summary


def _best_validation(metrics: Path) -> dict[str, Any]:
    """Return the validation line of the smallest loss, or nothing.

    Raises:
        ValueError: a line is malformed; the message names it.
    """
    best: dict[str, Any] = {"eval_loss": math.inf}
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            logged = json.loads(line)
            best = min(best, logged, key=lambda one: float(one.get("eval_loss", math.inf)))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{metrics.name}, line {number}: expected JSON with a number at 'eval_loss', found {line[:80]!r}"
            ) from error
    return {} if best["eval_loss"] == math.inf else best


def _metadata(summary: Record, settings: Record, title: str) -> ModelCardData:
    """Return what the Hub itself reads: library, licence, tags, data sets of the Hub, results."""
    census = summary.get("data.census_version", str)
    results = [
        EvalResult(
            task_type="feature-extraction",
            task_name="masked gene expression prediction, donors held out",
            dataset_type="custom",  # the Census is no data set of the Hub
            dataset_name=f"CELLxGENE Census {census}" if census else "see the card",
            dataset_revision=census,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for key, (kind, name) in _RESULTS.items()
        if (value := summary.get(f"best.{key}", (int, float))) is not None
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["scgpt", "single-cell", "biology", "transcriptomics", "gene-expression"],
        datasets=[name.split("@")[0] for name in _hub_datasets(settings)] or None,
        model_name=title,
        eval_results=results or None,
        license="cc-by-4.0" if census else "other",
        license_name=None if census else "see-the-sources",
    )


def _hub_datasets(settings: Record) -> list[str]:
    """Return the data sets of the Hub that the settings name, OWNER/NAME or OWNER/NAME@REVISION."""
    prefix = "hf://datasets/"
    named = [str(name) for name in settings.get("data.data", list) or []]
    return [name.removeprefix(prefix).rstrip("/") for name in named if name.startswith(prefix)]


def _how_to_load(processor: Record, settings: Record) -> str:
    cls_value = processor.number("cls_value", "g")
    cls_value = settings.number("data.cls_value", "g") if cls_value == UNKNOWN else cls_value
    return f"""## How to load

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModel, AutoProcessor
processor, model = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}"), AutoModel.from_pretrained("{LOCAL_CHECKPOINT}")
adata = sc.read_h5ad("cells.h5ad")  # raw counts
scgpt_hf.embed_anndata(adata, model, processor)  # adata.obsm["X_scgpt"]: (cells, hidden)
```

Without the package, transformers 5.4 or newer and the code that travels with the weights do it, some hundred cells at
a time:

```python
import scanpy as sc, torch
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
model = AutoModel.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
with torch.no_grad(): embedding = model(**processor(sc.read_h5ad("cells.h5ad")[:100])).cell_embedding
```

`AutoModelForPreTraining`, `AutoModelForMaskedLM` and `AutoModelForSequenceClassification` load too; a class head starts
untrained. The token `<cls>` carries the value {cls_value}: the processor sets it, other tokenisers must do the same."""


def _data(summary: Record, settings: Record) -> str:
    census = summary.get("data.census_version", str)
    files = settings.get("data.data", list) or summary.get("data.paths", list) or [summary.text("data.uri")]
    obs_filter = summary.get("data.obs_filter", str)
    rows = {
        "Source": "CELLxGENE Census" if census else _DEMO if files == ["demo"] else ", ".join(map(str, files)),
        "Organism": summary.text("data.organism").replace("_", " ").capitalize(),
        "Census version": census or "none: not read from a release of the Census",
        "Filter": f"`{obs_filter}`" if obs_filter else "none",
        **{
            part.capitalize(): f"{summary.number(f'{part}_cells')} cells of {summary.number(f'{part}_donors')} donors"
            for part in ("train", "validation")
        },
        "Kept together": f"`{settings.text('data.donor_key')}`, never in both parts",
        **make_up(summary),
        "Genes": f"{summary.number('genes')}, chosen on training cells ({settings.text('data.gene_selection')})",
        "Gene hash of the source": summary.text("data.gene_hash"),
        "Licence of the data": "CC BY 4.0, as all of the Census" if census else "see the sources",
        "Licence of this repository": (
            f"{'weights CC BY 4.0, as the data they learned from' if census else 'weights: see the sources'}; "
            "code Apache-2.0"
        ),
    }
    told = "In brackets: cells of both parts. `split.json` names the donors and the cells of each part, and every gene."
    return f"## Data\n\n{table(rows)}\n\n{told}"


def _training(summary: Record, settings: Record, config: Record) -> str:
    layers, width, heads = (
        settings.number(f"model.{name}", "d") for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    values = f"{settings.text('data.input_style')}, {settings.number('data.n_bins')} bins per cell"
    steps = f"{summary.number('steps')}, each of {summary.number('global_batch_size')} cells"
    rows = {
        "Model": f"{layers} layers x {width}, {heads} heads, {summary.number('model_parameters')} parameters",
        "Objectives and weights": pairs(config.get("loss_weights", dict)),
        "Values": f"{values}, at most {settings.number('data.max_tokens')} tokens",
        "Hidden share of a cell's genes": ", ".join(map(str, settings.get("data.mask_ratios", list) or [UNKNOWN])),
        "Steps": f"{steps}; {summary.number('epochs', '.3g')} epochs",
        "Dropout": settings.number("model.dropout", "g"),
        **recipe(summary, settings.number("training.learning_rate", "g")),
        **machine(summary, "train_seconds", "validation and checkpoints"),
        "Speed without them": f"{summary.number('cells_per_second', ',.0f')} cells/s",
        "Software": pairs(summary.get("versions", dict)),
    }
    repeat = "`settings.yaml` holds every setting; `pretrain.py settings.yaml` repeats the run where the data is."
    return f"## Training\n\n{table(rows)}\n\n{repeat}"


def make_up(summary: Record) -> dict[str, str]:
    """Return the rows on what the cells are, with the number of cells of each kind."""
    columns = {"Tissues": "tissue_general", "Assays": "assay", "Diseases": "disease", "Data sets": "dataset_id"}
    return {name: composition(summary, column) for name, column in columns.items()}


def recipe(summary: Record, learning_rate: str) -> dict[str, str]:
    """Return the rows on how the weights were changed; `learning_rate` is the highest, as text."""
    warmup = summary.get("recipe.warmup", (int, float))
    share = warmup is not None and warmup < 1
    steps = summary.number("recipe.warmup", ".0%" if share else ",.0f") + (" of the steps" if share else " steps")
    schedule = summary.text("recipe.schedule")
    decay, limit = (summary.number(f"recipe.{name}", "g") for name in ("weight_decay", "clipped_at"))
    return {
        "Learning rate": f"at most {learning_rate}, after a warm-up of {steps}, then: {schedule}",
        "Optimiser": f"{summary.text('recipe.optimiser')}, weight decay {decay}, gradients clipped at {limit}",
        "Seed": summary.number("recipe.seed", "d"),
    }


def machine(summary: Record, duration: str, included: str) -> dict[str, str]:
    """Return the rows on hardware, time and energy; the time is at the key `duration`, and has `included` in it."""
    seconds, processes = (summary.get(key, (int, float)) for key in (duration, "processes"))
    hours = UNKNOWN if seconds is None or processes is None else f"{seconds * processes / 3600:.3g}"
    return {
        "Precision": summary.text("precision"),
        "Hardware": f"{summary.number('processes')} x {summary.text('device')}",
        "Time": f"{summary.number(duration, ',.0f')} s, with {included}",
        "Device-hours, what energy goes by": hours,
    }


def _results(summary: Record, figures: list[str]) -> str:
    rows = "\n".join(f"| {name} | {summary.number(f'best.{key}', '.2f')} |" for name, key in _ERRORS.items())
    shown = "\n\n".join(f"![{name}]({name})" for name in figures)
    return f"""## Results

Hidden genes of held-out donors, step {summary.number("best.step")}. Expression is in bins, errors in bins squared.

| prediction | mean squared error |
| --- | --- |
{rows}

Share of the variance explained (1 - GEP / constant): {summary.number("best.eval_variance_explained", ".1%")}.

{shown}""".rstrip()


def how_to_cite(summary: Record) -> str:
    """Return the section that names scGPT, this software, and the Census where it was used."""
    version = summary.get("versions.scgpt_hf", str)
    lines = [
        "- scGPT: Cui, H. et al. scGPT: toward building a foundation model for single-cell multi-omics using "
        "generative AI. *Nature Methods* 21, 1470-1480 (2024). https://doi.org/10.1038/s41592-024-02201-0",
        "- this software: scgpt_hf" + (f", version {version}" if version else ""),
    ]
    if census := summary.get("data.census_version", str):
        lines.append(
            f"- CELLxGENE Census, version {census}: CZI Cell Science Program et al. CZ CELLxGENE Discover. "
            "*Nucleic Acids Research* 53, D886-D900 (2025). https://doi.org/10.1093/nar/gkae1142"
        )
    return "\n".join(["## How to cite\n", *lines])


def pairs(values: dict[str, Any] | None) -> str:
    """Return names and values in a line."""
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items()) or UNKNOWN


def table(rows: dict[str, str]) -> str:
    """Return a table of two columns without a head."""
    cells = [f"| {name} | {text} |" for name, text in ((name, rows[name].replace("|", "\\|")) for name in rows)]
    return "\n".join(["| | |", "| --- | --- |", *cells])


_DEMO = "demo: 700 blood cells of one donor that come with scanpy; its eight sequencing wells stand in for donors"
_WHAT = """A transformer over the genes of a cell, pretrained to predict hidden expression from the visible genes,
with the architecture and objectives of scGPT."""

_GOES_ON = (
    """**Training goes on.** These are the weights of a checkpoint; what is known only when it ends is left out."""
)

_USE_AND_LIMITS = """## Intended use

Embeddings of single cells, to explore, integrate and annotate them, and a start for fine-tuning. Input: raw counts of
the organism above; `processor.match_genes` says which of your genes the vocabulary knows.

## Limits

- Not for diagnosis, nor for any decision about a person.
- It has seen only the tissues, assays and states listed above; elsewhere its embeddings are untested.
- Effects of donor and assay remain in the embeddings.
- Bins are ranks within a cell: equal bins of two cells are not equal counts.
- Read the errors beside their baselines: ties among low counts cannot be predicted, and each gene's mean is easy.
- Compare with a simple method (variable genes and PCA) on your own data before relying on it."""
