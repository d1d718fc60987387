"""The report of a pretraining run: what was learned beside what is easy, from what data, how fast, and how to use it.

The numbers are those of the run folder; nothing is computed anew but the curves. `report_page.py` builds the page.
"""

from pathlib import Path
from typing import Any

from scgpt_hf.publishing.card import complete_summary
from scgpt_hf.publishing.record import UNKNOWN, Record, composition
from scgpt_hf.reporting.curves import plot_loss, read_metrics
from scgpt_hf.reporting.report_page import (
    Html,
    bar,
    code,
    drawing,
    facts,
    figures,
    fold,
    page,
    paragraph,
    picture,
    section,
    table,
)
from scgpt_hf.training.run_folder import BEST_MODEL, METRICS, SETTINGS, SPLIT, SUMMARY

_ERRORS = {
    "eval_constant_mse": ("one constant", "the mean bin of the training cells, for every gene: 0 % explained"),
    "eval_gene_mean_mse": ("mean of each gene", "knows the gene, not the cell: what any model must beat"),
    "eval_gep_mse": ("model, GEP", "hidden genes, from the genes of the cell that are visible"),
    "eval_gepc_mse": ("model, GEPC", "hidden genes, from the embedding of the cell alone"),
    "eval_tie_floor_mse": ("tie floor", "equal counts are spread over bins at random; nobody can do better"),
}
_PARTS = {"train": "Trained on", "validation": "Validated on"}


def report_run(run: Path) -> str:
    """Return the page of a pretraining run, finished or not.

    Args:
        run: the run folder, with any of settings.yaml, split.json, summary.json, metrics.jsonl and umap.png.

    Raises:
        ValueError: a file is malformed; the message names the file and the key.
    """
    settings, split = Record(run / SETTINGS), Record(run / SPLIT)
    summary = complete_summary(Record(run / SUMMARY), split, run / METRICS)
    lead = (
        f"A transformer over the genes of a cell, pretrained to predict hidden expression: "
        f"{summary.number('model_parameters')} parameters, {summary.number('train_cells')} cells."
    )
    if not (run / SUMMARY).is_file():
        lead += " The run is not finished; this is where it stands."
    return page(
        run.resolve().name,
        lead,
        _first_numbers(summary),
        _learning(run, summary),
        _cells(run),
        _data(summary, settings),
        _speed(summary),
        _use(run),
        _provenance(summary, settings, split),
    )


def _first_numbers(summary: Record) -> Html:
    return facts(
        {
            "of the variance of hidden genes explained (donors held out)": summary.number(
                "best.eval_variance_explained", ".1%"
            ),
            "error of the best model, bins²": summary.number("best.eval_gep_mse", ".1f"),
            "error of each gene's mean, bins²": summary.number("best.eval_gene_mean_mse", ".1f"),
            "cells per second": summary.number("cells_per_second", ",.1f"),
        }
    )


def _learning(run: Path, summary: Record) -> Html:
    """Return the curves and the errors beside those of simple predictors."""
    metrics = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    drawn = []
    for panel, key, caption in (
        ("training", "loss", "Loss on training cells; faint as logged, firm its running mean."),
        ("validation", "eval_gep_mse", "Error on held-out donors, between what is easy and what is possible."),
    ):
        if any(key in line for line in metrics):
            drawn.append(drawing(plot_loss(metrics, [panel]), caption))
    errors = {key: summary.get(f"best.{key}", (int, float)) for key in _ERRORS}
    told = {key: float(value) for key, value in errors.items() if value is not None}
    highest = max(told.values(), default=1.0)
    rows = [(*_ERRORS[key], f"{told[key]:.2f}", bar(told[key] / highest)) for key in _ERRORS if key in told]
    explained = (
        "Expression is binned within each cell, so errors are in bins squared, and mean little alone. Between the "
        "constant and the tie floor lies what can be learned; a model is worth its training below each gene's mean."
    )
    return section(
        "What it learned",
        figures(*drawn),
        paragraph(explained) if rows else "",
        table(rows, ("prediction", "what it is", "mean squared error", ""), numbers=[2]) if rows else "",
        paragraph(f"Best model: step {summary.number('best.step')}, epoch {summary.number('best.epoch', '.3g')}.")
        if rows
        else "",
    )


def _cells(run: Path) -> Html:
    caption = "Cells of the run on a map of their embeddings (UMAP), by cell type and by donor."
    return section("Its cells", figures(picture(run / "umap.png", caption)))


def _data(summary: Record, settings: Record) -> Html:
    rows = [("Source", _source(summary)), ("Filter", summary.text("data.obs_filter"))]
    for part, name in _PARTS.items():
        donors = summary.number(f"{part}_donors")
        rows.append((name, f"{summary.number(f'{part}_cells')} cells of {donors} donors"))
    rows += [
        ("Never in both parts", settings.text("data.donor_key")),
        ("Genes", f"{summary.number('genes')}, chosen on training cells ({settings.text('data.gene_selection')})"),
    ]
    rows += [
        (column.replace("_", " "), composition(summary, column)) for column in summary.get("composition", dict) or {}
    ]
    return section("Data", table(rows))


def _source(summary: Record) -> str:
    version = summary.get("data.census_version", str)
    where = summary.get("data.uri", str) or ", ".join(summary.get("data.paths", list) or []) or UNKNOWN
    return f"CELLxGENE Census {version}, {where}" if version else where


def _speed(summary: Record) -> Html:
    hours = summary.get("train_seconds", (int, float))
    rows = [
        ("Hardware", f"{summary.number('processes')} × {summary.text('device')}, {summary.text('precision')}"),
        ("Steps", f"{summary.number('steps')}, each of {summary.number('global_batch_size')} cells"),
        ("Epochs", summary.number("epochs", ".4g")),
        ("Time", UNKNOWN if hours is None else f"{hours / 3600:.2f} h"),
        ("Speed", f"{summary.number('cells_per_second', ',.1f')} cells/s, validation included"),
    ]
    return section("How fast", table(rows))


def _use(run: Path) -> Html:
    checkpoint = f"{run.resolve().name}/{BEST_MODEL}"
    return section(
        "How to load",
        code(f"python scripts/embed.py data.h5ad --model {checkpoint} --out embedded.h5ad"),
        code(
            "import scanpy as sc\n"
            "from scgpt_hf import embed_anndata\n\n"
            'adata = sc.read_h5ad("data.h5ad")  # raw counts\n'
            f'embed_anndata(adata, "{checkpoint}")\n'
            'sc.pp.neighbors(adata, use_rep="X_scgpt")\n'
            "sc.tl.umap(adata)"
        ),
    )


def _provenance(summary: Record, settings: Record, split: Record) -> Html:
    versions = summary.get("versions", dict) or {}
    rows = [
        ("Software", ", ".join(f"{name} {number}" for name, number in versions.items()) or UNKNOWN),
        ("Gene hash of the source", summary.text("data.gene_hash")),
        ("Seed", split.number("seed", "d")),
    ]
    groups = [
        fold(f"All settings: {name}", table([(key, _say(value)) for key, value in group.items()]))
        for name, group in settings.content.items()
        if isinstance(group, dict)
    ]
    return section("Provenance", table(rows), groups)


def _say(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
