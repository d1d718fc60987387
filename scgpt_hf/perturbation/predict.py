"""`predict_perturbation`: what control cells would be after a perturbation, as an AnnData."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from transformers import AutoModelForTokenClassification, PreTrainedModel

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.missing import fill_missing
from scgpt_hf.cells.obs import require_named_columns
from scgpt_hf.perturbation.cells import log_values, read_totals
from scgpt_hf.perturbation.conditions import CONTROL, name_condition, parse_conditions, require_genes
from scgpt_hf.perturbation.effects import predict_cells, spread_over_batches
from scgpt_hf.perturbation.gene_names import match_screen_genes
from scgpt_hf.pretrained import load_model
from scgpt_hf.progress_bar import progress_bar
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "scgpt_perturbation"

Control = str | Sequence[bool] | npt.NDArray[np.bool_] | None


def predict_perturbation(
    adata: "AnnData",
    conditions: Sequence[str] | str,
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    control: Control = CONTROL,
    condition_key: str = "condition",
    batch_key: str | None = None,
    context_key: str | None = None,
    n_cells: int = 100,
    layer: str | None = None,
    round_counts: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> "AnnData":
    """Predict control cells as they would be after genetic perturbations.

    A gene that was perturbed in no training condition is predicted through its vector. Perturbed genes need not be
    measured in the data; they must be in the model's vocabulary.

    Args:
        adata: raw counts, with control cells; genes by Ensembl id or symbol.
        conditions: as in GEARS, e.g. `["KLF1+MAP2K6", "STAT1+ctrl"]`; the order of genes does not matter.
        model: folder or Hub repository of a perturbation model, or a loaded one, which runs where it is.
        processor: the processor of a loaded model.
        control: which cells are controls: their value in `obs[condition_key]`, one boolean for each cell, or None if
            all are.
        condition_key: obs column with the conditions.
        batch_key: obs column of the experimental batch; by default that of the training, if the data have it. Every
            batch contributes control cells.
        context_key: obs column of what effects differ between, e.g. the cell line; each is predicted by itself.
        n_cells: control cells for each condition and context; all if there are fewer.
        layer: layer with the raw counts; by default the one that has them.
        round_counts: round fractional counts.
        batch_size: cells per batch; changes speed, not the result.
        seed: seed of the choice of control cells.
        progress: show a progress bar.

    Returns:
        An AnnData with a row for each control cell and condition. `X` holds predicted log1p values, `layers["control"]`
        the values before, `layers["delta"]` the difference; `obs` has `condition`, `context`, `batch` and
        `control_cell`. `varm["mean"]` and `varm["delta"]` are tables of genes × conditions (`CONDITION` or
        `CONDITION | CONTEXT`): the mean prediction, and its difference to the control mean. `uns["scgpt_perturbation"]`
        records model and settings.

    Raises:
        OSError: there is no such model.
        ValueError: a condition is invalid, a gene is not in the vocabulary (the message lists the nearest names), there
            is no control cell, the counts are not raw, or too few genes are known.

    Example:
        >>> found = predict_perturbation(adata, ["KLF1+MAP2K6"], "runs/crispr/best_model")  # doctest: +SKIP
        >>> found.varm["delta"]["KLF1+MAP2K6"].nlargest(5)  # doctest: +SKIP
    """
    wanted = parse_conditions(conditions, control if isinstance(control, str) else CONTROL)
    source = AnnDataSource(adata, layer=layer, primary_only=False, round_counts=round_counts)
    model, processor = load_model(
        model, processor, AutoModelForTokenClassification, heads=("expression_head", "flag_encoder")
    )
    if batch_key is None and model.config.batch_key in source.obs_columns:
        batch_key = model.config.batch_key
    total_key = model.config.total_key
    keys = {"batch_key": batch_key, "context_key": context_key, "total_key": total_key}
    require_named_columns(keys, source.obs_columns)
    genes = match_screen_genes(source.genes, processor)
    require_genes((gene for one in wanted for gene in one), genes.id_of_name.keys(), "the model")
    obs = source.obs(list(dict.fromkeys(key for key in (batch_key, context_key, total_key) if key)))
    rows = _control_rows(source, control, condition_key)
    counts = source.read(obs.index.to_numpy(np.int64)[rows]).counts
    obs = obs.iloc[rows]
    values = log_values(counts, read_totals(obs, total_key, counts), processor.target_sum)
    contexts, batches = (_text(obs, key) for key in (context_key, batch_key))
    parts, columns = [], {}
    jobs = [(one, context) for one in wanted for context in np.unique(contexts)]
    for condition, context in progress_bar(jobs, description="predicting", unit="conditions", show=progress):
        name = name_condition(condition)
        chosen = spread_over_batches(np.flatnonzero(contexts == context), batches, n_cells, seed)
        found = predict_cells(
            model, processor, values, genes, chosen, genes.target_ids(condition), batch_size=batch_size
        )
        before = values[chosen].toarray()
        parts.append((name, str(context), chosen, found, before))
        column = f"{name} | {context}" if context_key else name
        columns[column] = found.mean(axis=0), found.mean(axis=0) - before.mean(axis=0)
    provenance = {
        "model": str(model.name_or_path),
        "scgpt_hf": version("scgpt_hf"),
        "target_sum": processor.target_sum,
        "genes": genes.coverage,
        "n_cells": n_cells,
        "seed": seed,
    }
    return _to_anndata(parts, columns, adata.obs_names[rows], batches, source.genes, provenance)


def _control_rows(source: AnnDataSource, control: Control, condition_key: str) -> Int64Array:
    """Return the rows of the control cells.

    Raises:
        ValueError: there is none.
    """
    if control is None:
        return np.arange(len(source.obs()))
    if not isinstance(control, str):
        mask = np.asarray(control)
        if mask.dtype != np.bool_ or mask.shape != (len(source.obs()),):
            raise ValueError(f"control has {mask.dtype} of shape {mask.shape}; expected one boolean for each cell")
        found = np.flatnonzero(mask)
    else:
        require_named_columns({"condition_key": condition_key}, source.obs_columns)
        column = fill_missing(source.obs([condition_key])[condition_key])
        found = np.flatnonzero((column == control).to_numpy())
    if not len(found):
        values = "" if not isinstance(control, str) else f"; its values are such as {sorted(set(column))[:5]}"
        raise ValueError(
            f"no cell is a control: found none for control={control if isinstance(control, str) else '[...]'!r} in "
            f"obs[{condition_key!r}]{values}; name the control with control=..., or pass control=None if all cells are"
        )
    return found


def _text(obs: pd.DataFrame, key: str | None) -> npt.NDArray[np.str_]:
    return np.asarray([""] * len(obs) if key is None else fill_missing(obs[key]).astype(str), dtype=np.str_)


def _to_anndata(
    parts: Sequence[tuple[str, str, Int64Array, npt.NDArray[np.float32], npt.NDArray[np.float32]]],
    columns: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
    names: pd.Index,
    batches: npt.NDArray[np.str_],
    genes: pd.DataFrame,
    provenance: dict[str, Any],
) -> "AnnData":
    """Return the predictions as an AnnData; see `predict_perturbation`."""
    from anndata import AnnData

    found, before = (np.concatenate([part[place] for part in parts]) for place in (3, 4))
    obs = pd.DataFrame(
        {
            "condition": np.concatenate([[name] * len(rows) for name, _, rows, _, _ in parts]),
            "context": np.concatenate([[context] * len(rows) for _, context, rows, _, _ in parts]),
            "batch": np.concatenate([batches[rows] for _, _, rows, _, _ in parts]),
            "control_cell": np.concatenate([names[rows].astype(str) for _, _, rows, _, _ in parts]),
        }
    )
    obs.index = (obs["control_cell"] + "-" + obs["condition"]).astype(str)
    var = genes.set_index("feature_id")
    tables = {
        table: pd.DataFrame({name: pair[place] for name, pair in columns.items()}, index=var.index)
        for place, table in enumerate(("mean", "delta"))
    }
    layers = {"control": before, "delta": found - before}
    return AnnData(found, obs=obs, var=var, layers=layers, varm=tables, uns={KEY: provenance})
