"""Which type each cell is: from a fine-tuned classifier, or from the nearest cells of an annotated reference.

Both write a label, a confidence, and "unassigned" where the confidence is too low; neither can name a type that it was
not taught. `annotate_file.py` serves files.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from scgpt_hf.analysis.embed import KEY
from scgpt_hf.analysis.inference import RunSettings, run_batches
from scgpt_hf.cells.source import open_source
from scgpt_hf.pipeline.genes import match_columns
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.pretrained import load_pretrained
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

UNASSIGNED = "unassigned"
PREDICTED = "predicted_cell_type"

FloatArray = npt.NDArray[np.floating[Any]]

# Cells of the reference whose distances to their neighbours say what is usual; more would only take longer.
_MEASURED_CELLS = 5_000


def load_classifier(name: str | Path, device: str | None = None) -> tuple[PreTrainedModel, ScGPTProcessor]:
    """Return the fine-tuned classifier and the processor saved in a folder or a repository of the Hub.

    Args:
        name: the folder, or the repository's id.
        device: where the model goes; by default a GPU if there is one.

    Raises:
        OSError, ValueError: see `load_pretrained`; or the model has no class head that was trained.
    """
    model, processor, new = load_pretrained(name, AutoModelForSequenceClassification)
    if "class_head" in new:
        raise ValueError(f"{name} has no trained class head; scripts/finetune.py trains one on labelled cells")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor  # type: ignore[arg-type]


def predict_cell_types(
    adata: "AnnData",
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    threshold: float = 0.5,
    key: str = PREDICTED,
    layer: str | None = None,
    overwrite: bool = False,
    **settings: Unpack[RunSettings],
) -> dict[str, Any]:
    """Write the type of each cell to `adata.obs[key]`, and how sure the model is to `adata.obs[key + "_confidence"]`.

    The confidence is the highest probability that a fine-tuned classifier gives any type; below the threshold the type
    is "unassigned". With `empty="nan"`, cells that express no gene the model knows are "unassigned" with NaN.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: folder or repository of a classifier, or a classifier that is loaded.
        processor: of a loaded model.
        threshold: confidence from which a cell gets its type, in [0, 1].
        key: name of the columns, and of the report in `adata.uns`.
        layer: where the raw counts are, `X` by default.
        overwrite: replace columns of that name.
        settings: see `RunSettings`.

    Returns:
        The report: the model, the threshold, the cells of each type, the genes found.

    Raises:
        ValueError: a column is taken, the model has no trained classes, or as `embed_anndata`.
    """
    _require_share(threshold)
    _require_free_columns(key, adata.obs, overwrite)
    source = open_source(adata, layer=layer, primary_only=False)
    if isinstance(model, str | Path):
        model, processor = load_classifier(model)
    if processor is None or getattr(model, "class_head", None) is None:
        missing = "its processor" if processor is None else "a class head"
        raise ValueError(f"the model comes without {missing}; pass a classifier and its processor, or their folder")
    classifier: Any = model
    names = [str(name) for _, name in sorted(classifier.config.id2label.items())]

    def probabilities(batch: Batch) -> torch.Tensor:
        return torch.softmax(classifier(**batch).logits.float(), dim=-1)

    cell_ids = source.obs().index.to_numpy(np.int64)
    found = np.full((len(cell_ids), len(names)), np.nan, np.float32)
    batches = run_batches(probabilities, source, cell_ids, model, processor, doing="annotating", **settings)
    for positions, rows in batches:
        found[positions] = rows
    report = {"model": model.name_or_path, "genes": match_columns(source.genes, processor)[1]}
    return _write_types(adata, key, names, found, threshold, report)


def transfer_labels(
    query: "AnnData",
    reference: "AnnData",
    *,
    key: str = "cell_type",
    obsm: str = KEY,
    n_neighbors: int = 15,
    threshold: float = 0.5,
    max_distance: float | None = None,
    ignore: Sequence[str] = ("unknown",),
    key_added: str = PREDICTED,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the type of each cell of the query, voted by its nearest cells of the reference, as `predict_cell_types`.

    Each of the nearest labelled cells of the reference votes with the inverse of its distance; the confidence is the
    winner's share of the votes. A type that the reference lacks gets the name of its nearest neighbours, often
    unanimously. What tells such cells is `obs[key_added + "_distance"]`, the mean distance to the neighbours: cells
    beyond `max_distance` are "unassigned". The report gives `usual_distance`, which 1 % of the reference's own cells
    exceed, and how many cells of the query do.

    Args:
        query: cells with an embedding in `obsm`.
        reference: other cells, embedded by the same model, with labels.
        key: obs column of the reference with the labels.
        obsm: name of the embedding in both.
        n_neighbors: cells of the reference that vote.
        threshold: share of the votes from which a cell gets its type, in [0, 1].
        max_distance: mean distance to the neighbours beyond which a cell is "unassigned".
        ignore: values of `key` that are no label; missing values never are.
        key_added: name of the columns, and of the report in `query.uns`.
        overwrite: replace columns of that name.

    Returns:
        The report: the cells of each type, the usual distance and how many cells are beyond it.

    Raises:
        ValueError: there is no such embedding, or not the same model's; the reference has a single label, or too few
            cells that have any; or a column is taken.

    Source: distance-weighted nearest neighbours, Dudani 1976, IEEE Trans. Syst. Man Cybern. SMC-6:325.
    """
    _require_share(threshold)
    _require_free_columns(key_added, query.obs, overwrite)
    vectors, of_reference = _comparable(query, reference, obsm)
    labelled, labels = _labels_of(reference, key, ignore, of_reference, n_neighbors)
    of_reference = of_reference[labelled]
    voters = KNeighborsClassifier(n_neighbors, weights="distance").fit(of_reference, labels)
    told = np.isfinite(vectors).all(axis=1)
    found = np.full((len(vectors), len(voters.classes_)), np.nan)
    distance = np.full(len(vectors), np.nan)
    found[told] = voters.predict_proba(vectors[told])
    distance[told] = voters.kneighbors(vectors[told])[0].mean(axis=1)
    usual = _usual_distance(voters, of_reference, n_neighbors)
    report = {
        "reference_cells": len(of_reference),
        "usual_distance": usual,
        "cells_beyond": int((distance > usual).sum()),
    }
    if max_distance is not None:
        report["max_distance"] = max_distance
        found[distance > max_distance] = np.nan
    query.obs[f"{key_added}_distance"] = distance.astype(np.float32)
    return _write_types(query, key_added, [str(name) for name in voters.classes_], found, threshold, report)


def _write_types(
    adata: "AnnData", key: str, names: list[str], found: FloatArray, threshold: float, report: dict[str, Any]
) -> dict[str, Any]:
    """Write types, confidences and the report, which is returned; rows of NaN are "unassigned".

    Args:
        adata: gets them.
        key: their name.
        names: of the types. Shape (types,).
        found: how likely each type is. Shape (cells, types).
        threshold: see `predict_cell_types`.
        report: what else to tell.
    """
    confidence = found.max(axis=1).astype(np.float32)
    best = np.where(confidence >= threshold, np.nan_to_num(found).argmax(axis=1), len(names))
    types = pd.Categorical(np.array([*names, UNASSIGNED], dtype=object)[best])
    adata.obs[key] = types
    adata.obs[f"{key}_confidence"] = confidence
    n_cells = types.value_counts()
    report |= {
        "threshold": threshold,
        "cells": len(types),
        "unassigned": int(n_cells.get(UNASSIGNED, 0)),
        # Lists, since names such as "CD4+/CD45RO+" cannot be keys in a file.
        "types": {"name": [str(name) for name in n_cells.index], "cells": [int(n) for n in n_cells]},
        "scgpt_hf": version("scgpt_hf"),
    }
    adata.uns[key] = report
    return report


def _comparable(query: "AnnData", reference: "AnnData", obsm: str) -> tuple[FloatArray, FloatArray]:
    """Return both embeddings, or raise unless they can be compared."""
    for name, adata in (("query", query), ("reference", reference)):
        if obsm not in adata.obsm:
            raise ValueError(f"the {name} has no obsm[{obsm!r}], only {sorted(adata.obsm)}; embed_anndata writes it")
        if not adata.n_obs:
            raise ValueError(f"the {name} has no cells")
    models = [str(adata.uns.get(obsm, {}).get("model", "")) for adata in (query, reference)]
    if all(models) and models[0] != models[1]:
        raise ValueError(
            f"the query was embedded by {models[0]}, the reference by {models[1]}; embed both by one model"
        )
    one, other = np.asarray(query.obsm[obsm]), np.asarray(reference.obsm[obsm])
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"the query has vectors of {one.shape[1]}, the reference of {other.shape[1]} numbers")
    return one, other


def _labels_of(
    reference: "AnnData", key: str, ignore: Sequence[str], vectors: FloatArray, n_neighbors: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.str_]]:
    """Return which cells of the reference have a label and an embedding, (cells,), and their labels, (such cells,)."""
    if key not in reference.obs:
        raise ValueError(f"the reference has no obs[{key!r}]; its columns are {list(reference.obs)}")
    text = reference.obs[key].astype(object)
    labelled = (text.notna() & ~text.astype(str).isin(["", *ignore])).to_numpy(bool) & np.isfinite(vectors).all(axis=1)
    if labelled.sum() <= n_neighbors:
        raise ValueError(
            f"{labelled.sum():,} of {len(text):,} cells of the reference have a label in obs[{key!r}], expected more "
            f"than the {n_neighbors} neighbours that vote; choose another column, or fewer neighbours"
        )
    labels = text[labelled].astype(str).to_numpy(str)
    if (labels == labels[0]).all():
        raise ValueError(
            f"all {len(labels):,} labelled cells of the reference have {str(labels[0])!r} in obs[{key!r}], which "
            "every cell would be called; give a reference with two labels or more"
        )
    return labelled, labels


def _usual_distance(voters: KNeighborsClassifier, vectors: FloatArray, n_neighbors: int) -> float:
    """Return the mean distance to their neighbours that 1 % of the reference's cells exceed, themselves left out."""
    drawn = np.random.default_rng(0).permutation(len(vectors))[:_MEASURED_CELLS]
    distance = voters.kneighbors(vectors[drawn], n_neighbors + 1)[0][:, 1:]
    return float(np.quantile(distance.mean(axis=1), 0.99))


def _require_share(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold in [0, 1], found {threshold}")


def _require_free_columns(key: str, obs: pd.DataFrame, overwrite: bool) -> None:
    taken = [name for name in (key, f"{key}_confidence", f"{key}_distance") if name in obs]
    if taken and not overwrite:
        raise ValueError(f"obs has {taken} already; choose another name, or overwrite them")
