"""Make the report page of a pretraining run: losses, errors and baselines, cells, training, and how to load the model.

Numbers come from the run folder, as `publishing/run_summary.py` states them. `page.py` builds the page.
"""

from pathlib import Path

from scgpt_hf.publishing.record import RunRecord, read_metrics
from scgpt_hf.publishing.run_summary import (
    EMBEDDING_SCORES,
    error_rows,
    explain_values,
    pretraining_data,
    pretraining_recipe,
    read_summary,
    score_rows,
    supervision_rows,
    value_unit,
)
from scgpt_hf.reporting.curves import loss_figures, plot_cell_types
from scgpt_hf.reporting.page import (
    Html,
    bar,
    code_block,
    collapsed,
    figures,
    format_value,
    inline_png,
    inline_svg,
    key_numbers,
    page,
    paragraph,
    section,
    table,
)
from scgpt_hf.training.run_folder import BEST_MODEL, METRICS, SETTINGS, SUMMARY

_CAPTIONS = {
    "training": "Loss on training cells: faint line as logged, bold line running mean.",
    "validation": "Error on held-out donors; dashed lines are simple predictions and the tie floor.",
}
_ERRORS_EXPLAINED = (
    "The model predicts the expression of masked genes in cells of held-out donors. {values} Errors say little without "
    "the simple predictions in the table. A model is useful if its error is below that of each gene's mean."
)


def pretraining_report(run: Path) -> str:
    """Return the report page of a pretraining run, finished or in progress.

    Args:
        run: the run folder, with any of settings.yaml, split.json, summary.json, metrics.jsonl and umap.png.

    Raises:
        ValueError: a file is malformed; the message names the file and the key.
    """
    settings, summary = RunRecord.read(run / SETTINGS), read_summary(run)
    config = RunRecord.read(run / BEST_MODEL / "config.json")
    lead = (
        f"A transformer with {summary.number('model_parameters')} parameters, pretrained on "
        f"{summary.number('train_cells')} cells to predict the expression of masked genes."
    )
    if not (run / SUMMARY).is_file():
        lead += " The run is not finished; the page shows its current state."
    return page(
        run.resolve().name,
        lead,
        _key_numbers(summary),
        _learning(run, summary),
        _cell_types(run, summary),
        section(
            "UMAP of the cells",
            figures(
                inline_png(run / "umap.png", "Cells of the run, embedded by the model; colored by type and donor.")
            ),
        ),
        section(
            "Data", table([*pretraining_data(summary, settings).items()]), paragraph("Numbers in brackets count cells.")
        ),
        section("Training", table([*pretraining_recipe(summary, settings, config).items()])),
        *_supervision(summary),
        _how_to_load(run),
        section("Settings", _settings(settings)),
    )


def _supervision(summary: RunRecord) -> list[Html]:
    """Return the section on the labels of a supervised run; no section for any other run."""
    if not (rows := supervision_rows(summary)):
        return []
    text = "This model was trained with labels. Compare it with other supervised models."
    return [section("Supervision", paragraph(text), table([*rows.items()]))]


def _key_numbers(summary: RunRecord) -> Html:
    unit = value_unit(summary)
    return key_numbers(
        {
            "of the variance of masked genes explained (held-out donors)": summary.number(
                "best.eval_variance_explained", ".1%"
            ),
            f"mean squared error of the best model (GEP), {unit}²": summary.number("best.eval_gep_mse", ".3g"),
            f"mean squared error of each gene's mean, {unit}²": summary.number("best.eval_gene_mean_mse", ".3g"),
            "cells per second": summary.number("cells_per_second", ",.1f"),
        }
    )


def _learning(run: Path, summary: RunRecord) -> Html:
    """Return the loss curves, and the errors of the model and of simple predictions."""
    errors = [(row.name, row.meaning, row.value) for row in error_rows(summary) if row.value is not None]
    highest = max((value for _, _, value in errors), default=1.0)
    rows = [(name, meaning, f"{value:.2f}", bar(value / highest)) for name, meaning, value in errors]
    floor = " No model can go below the tie floor." if value_unit(summary) == "bins" else ""
    best = f"Best model: step {summary.number('best.step')}, epoch {summary.number('best.epoch', '.3g')}."
    return section(
        "Learning",
        figures(*loss_figures(run, _CAPTIONS, summary.get("best.step", int))),
        [
            paragraph(_ERRORS_EXPLAINED.format(values=explain_values(summary)) + floor),
            table(rows, ("prediction", "what it uses", "mean squared error", ""), numeric_columns=[2]),
            paragraph(best),
        ]
        if rows
        else "",
    )


def _cell_types(run: Path, summary: RunRecord) -> Html:
    """Return the scores of the embedding of labelled cells beside the baselines; nothing without `eval_labels`."""
    if not (rows := score_rows(summary)):
        return Html("")
    metrics = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    has_curves = any(f"eval_{name}" in line for line in metrics for name in EMBEDDING_SCORES)
    caption = "Scores at each validation; dashed lines are PCA, fitted to training cells."
    cells = [(row.method, *("–" if score is None else f"{score:.3f}" for score in row.scores)) for row in rows]
    names = [name for name, _ in EMBEDDING_SCORES.values()]
    return section(
        "Cell types",
        paragraph(
            "Labelled cells of held-out donors: how well the embedding separates their types and mixes their batches. "
            "PCA and the small network are fitted to training cells. Higher is better."
        ),
        figures(*([inline_svg(plot_cell_types(metrics), caption)] if has_curves else [])),
        table(cells, ("embedding", *names), numeric_columns=range(1, len(names) + 1)),
        collapsed("What the scores mean", table([*EMBEDDING_SCORES.values()])),
    )


def _how_to_load(run: Path) -> Html:
    checkpoint = f"{run.resolve().name if run.is_absolute() else run.as_posix()}/{BEST_MODEL}"
    return section(
        "How to load",
        code_block(f"scgpt-hf embed data.h5ad --model {checkpoint} --out embedded.h5ad"),
        code_block(
            "import scanpy as sc\n"
            "from scgpt_hf import embed_anndata\n\n"
            'adata = sc.read_h5ad("data.h5ad")  # raw counts\n'
            f'embed_anndata(adata, "{checkpoint}")\n'
            'sc.pp.neighbors(adata, use_rep="X_scgpt")\n'
            "sc.tl.umap(adata)"
        ),
    )


def _settings(settings: RunRecord) -> list[Html]:
    return [
        collapsed(f"All settings: {name}", table([(key, format_value(value)) for key, value in group.items()]))
        for name, group in settings.content.items()
        if isinstance(group, dict)
    ]
