"""Annotate cells with their types, by a fine-tuned classifier or by the nearest cells of an annotated reference.

Both write a label, a confidence, and "unassigned" where the confidence is too low; neither can name a type that it was
not trained on or that the reference lacks. `annotate_file.py` serves files.
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

from scgpt_hf.analysis.embed import KEY, embedding_of, validate_name, validate_not_backed_view
from scgpt_hf.cells.block import FloatArray
from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.missing import fill_missing, has_label
from scgpt_hf.inference import InferenceSettings, iterate_outputs
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

UNASSIGNED = "unassigned"
PREDICTED = "predicted_cell_type"
# Arguments of `load_model` for a classifier.
CLASSIFIER: dict[str, Any] = {"model_class": AutoModelForSequenceClassification, "heads": ("class_head",)}


# Cells of the reference that are sampled to measure the usual distance between neighbors; its 99th percentile does not
# change with more, only the time.
_DISTANCE_CELLS = 5_000


def predict_cell_types(
    adata: "AnnData",
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    threshold: float = 0.5,
    key_added: str = PREDICTED,
    layer: str | None = None,
    round_counts: bool = False,
    overwrite: bool = False,
    **settings: Unpack[InferenceSettings],
) -> dict[str, Any]:
    """Predict the type of each cell with a fine-tuned classifier and write it to `adata.obs[key_added]`.

    The confidence, in `adata.obs[key_added + "_confidence"]`, is the highest probability of any type; below the
    threshold the type is "unassigned". With `empty="nan"`, cells that express no gene of the model's vocabulary are
    "unassigned", with NaN.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: folder or Hub repository of a classifier, or a loaded classifier.
        processor: the processor of a loaded model.
        threshold: lowest confidence with which a cell gets its type, in [0, 1].
        key_added: name of the columns, and of the report in `adata.uns`.
        layer: layer with the raw counts; by default `X`, or the only other one that has them, see `AnnDataSource`.
        round_counts: round fractional counts.
        overwrite: replace columns of that name.
        settings: see `InferenceSettings`.

    Returns:
        The report that is also written to `adata.uns[key_added]`: the model, the threshold, the number of cells of each
        type, the genes that were matched.

    Raises:
        ValueError: a column exists, the model has no trained classes; see also `embed_anndata`.

    Example:
        >>> report = predict_cell_types(adata, "runs/types/best_model", threshold=0.7)  # doctest: +SKIP
        >>> adata.obs["predicted_cell_type"].value_counts().head(2)  # doctest: +SKIP
        predicted_cell_type
        T cell        412
        unassigned    139
        Name: count, dtype: int64
    """
    _validate_threshold(threshold)
    validate_not_backed_view(adata)
    _validate_free_columns(key_added, adata.obs, overwrite)
    source = AnnDataSource(adata, layer=layer, primary_only=False, round_counts=round_counts)
    model, processor = load_model(model, processor, **CLASSIFIER)
    classifier: Any = model
    names = [str(name) for _, name in sorted(classifier.config.id2label.items())]

    def compute_probabilities(batch: Batch) -> torch.Tensor:
        return torch.softmax(classifier(**batch).logits.float(), dim=-1)

    cell_ids = source.obs().index.to_numpy(np.int64)
    genes = match_source_genes(source.genes, processor)
    probabilities = np.full((len(cell_ids), len(names)), np.nan, np.float32)
    batches = iterate_outputs(
        compute_probabilities,
        source,
        cell_ids,
        model,
        processor,
        gene_match=genes,
        description="annotating",
        **settings,
    )
    for positions, rows in batches:
        probabilities[positions] = rows
    origin = {name: value for name, value in source.describe().items() if name in ("layer", "round_counts")}
    report = {"model": model.name_or_path, **origin, "genes": genes.coverage}
    return _write_types(adata, key_added, names, probabilities, threshold, report)


def transfer_labels(
    query: "AnnData",
    reference: "AnnData",
    *,
    labels_key: str = "cell_type",
    use_rep: str = KEY,
    n_neighbors: int = 15,
    threshold: float = 0.5,
    max_distance: float | None = None,
    ignore: Sequence[str] = ("unknown",),
    key_added: str = PREDICTED,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Transfer labels from an annotated reference to a query, by a vote of the nearest cells in an embedding.

    Each of the nearest labelled cells of the reference votes with the inverse of its distance; the confidence is the
    winner's share of the votes. Columns are named as in `predict_cell_types`.

    A cell of a type that the reference lacks gets the name of its nearest neighbors, often unanimously, so confidence
    does not reveal it. Distance does: `obs[key_added + "_distance"]` is the mean distance to the neighbors, and cells
    beyond `max_distance` are "unassigned". The report gives the `usual_distance`, which 1 % of the reference cells
    exceed, and the number of query cells beyond it.

    Args:
        query: cells with an embedding.
        reference: labelled cells, embedded by the same model.
        labels_key: obs column of the reference with the labels.
        use_rep: name of the embedding in `obsm` of both.
        n_neighbors: number of reference cells that vote.
        threshold: lowest share of the votes with which a cell gets its type, in [0, 1].
        max_distance: mean distance to the neighbors beyond which a cell is "unassigned".
        ignore: further values of `labels_key` that are not labels, besides missing values and "unknown".
        key_added: name of the columns, and of the report in `query.uns`.
        overwrite: replace columns of that name.

    Returns:
        The report that is also written to `query.uns[key_added]`: the number of cells of each type, the usual distance,
        and the number of cells beyond it.

    Raises:
        ValueError: an embedding is missing, or the two were made by different models; the reference has a single label,
            or too few labelled cells; a column exists.

    Source: distance-weighted nearest neighbors, Dudani 1976, IEEE Trans. Syst. Man Cybern. SMC-6:325.

    Example:
        >>> for adata in (reference, query):
        ...     report = embed_anndata(adata, "runs/demo/best_model", progress=False)
        >>> report = transfer_labels(query, reference, labels_key="cell_type")
        >>> sorted(set(query.obs) - set(reference.obs))
        ['predicted_cell_type', 'predicted_cell_type_confidence', 'predicted_cell_type_distance']
    """
    validate_transfer(
        query,
        reference,
        labels_key=labels_key,
        n_neighbors=n_neighbors,
        threshold=threshold,
        ignore=ignore,
        key_added=key_added,
        overwrite=overwrite,
    )
    query_vectors, reference_vectors = _comparable_vectors(query, reference, use_rep)
    has_vector = np.asarray(np.isfinite(reference_vectors).all(axis=1))
    labelled, labels = _reference_labels(reference, labels_key, ignore, has_vector, n_neighbors)
    reference_vectors = reference_vectors[labelled]
    classifier = KNeighborsClassifier(n_neighbors, weights="distance").fit(reference_vectors, labels)
    embedded = np.isfinite(query_vectors).all(axis=1)
    votes = np.full((len(query_vectors), len(classifier.classes_)), np.nan)
    distance = np.full(len(query_vectors), np.nan)
    votes[embedded] = classifier.predict_proba(query_vectors[embedded])
    distance[embedded] = classifier.kneighbors(query_vectors[embedded])[0].mean(axis=1)
    usual = _usual_distance(classifier, reference_vectors, n_neighbors)
    report = {
        "reference_cells": len(reference_vectors),
        "usual_distance": usual,
        "cells_beyond": int((distance > usual).sum()),
    }
    if max_distance is not None:
        report["max_distance"] = max_distance
        votes[distance > max_distance] = np.nan
    query.obs[f"{key_added}_distance"] = distance.astype(np.float32)
    return _write_types(query, key_added, [str(name) for name in classifier.classes_], votes, threshold, report)


def validate_transfer(
    query: "AnnData",
    reference: "AnnData",
    *,
    labels_key: str,
    n_neighbors: int,
    threshold: float,
    ignore: Sequence[str],
    key_added: str,
    overwrite: bool,
) -> None:
    """Raise for everything that keeps `transfer_labels` from working and that is known before cells are embedded.

    Args:
        query: see `transfer_labels`.
        reference: see `transfer_labels`.
        labels_key: see `transfer_labels`.
        n_neighbors: see `transfer_labels`.
        threshold: see `transfer_labels`.
        ignore: see `transfer_labels`.
        key_added: see `transfer_labels`.
        overwrite: see `transfer_labels`.

    Raises:
        ValueError: one has no cells; a column of the query exists; the labels of the reference cannot be used.
    """
    _validate_threshold(threshold)
    validate_not_backed_view(query)
    _validate_free_columns(key_added, query.obs, overwrite)
    for name, adata in (("query", query), ("reference", reference)):
        if not adata.n_obs:
            raise ValueError(f"the {name} has no cells")
    _reference_labels(reference, labels_key, ignore, np.ones(reference.n_obs, bool), n_neighbors)


def _write_types(
    adata: "AnnData", key: str, names: list[str], probabilities: FloatArray, threshold: float, report: dict[str, Any]
) -> dict[str, Any]:
    """Write types, confidences and the report to an AnnData, and return the report; rows of NaN are "unassigned".

    Args:
        adata: the AnnData to write to.
        key: name of the columns and of the report.
        names: names of the types. Shape (types,).
        probabilities: probability or share of the votes of each type. Shape (cells, types).
        threshold: see `predict_cell_types`.
        report: what else to report.
    """
    confidence = probabilities.max(axis=1).astype(np.float32)
    best = np.where(confidence >= threshold, np.nan_to_num(probabilities).argmax(axis=1), len(names))
    types = pd.Categorical(np.array([*names, UNASSIGNED], dtype=object)[best])
    adata.obs[key] = types
    adata.obs[f"{key}_confidence"] = confidence
    n_cells = types.value_counts()
    report |= {
        "threshold": threshold,
        "cells": len(types),
        "unassigned": int(n_cells.get(UNASSIGNED, 0)),
        # Two lists and not a dictionary, because names such as "CD4+/CD45RO+" cannot be keys in an .h5ad file.
        "types": {"name": [str(name) for name in n_cells.index], "cells": [int(n) for n in n_cells]},
        "scgpt_hf": version("scgpt_hf"),
    }
    adata.uns[key] = report
    return report


def _comparable_vectors(query: "AnnData", reference: "AnnData", use_rep: str) -> tuple[FloatArray, FloatArray]:
    """Return the embeddings of query and reference, each (cells, hidden).

    Raises:
        ValueError: one is missing, or they were made by different models.
    """
    for name, adata in (("query", query), ("reference", reference)):
        if use_rep not in adata.obsm:
            raise ValueError(f"the {name} has no obsm[{use_rep!r}], only {sorted(adata.obsm)}; embed_anndata writes it")
    models = [str(adata.uns.get(use_rep, {}).get("model", "")) for adata in (query, reference)]
    if all(models) and models[0] != models[1]:
        raise ValueError(
            f"the query was embedded by {models[0]}, the reference by {models[1]}; embed both by one model"
        )
    query_vectors, reference_vectors = (embedding_of(adata, use_rep) for adata in (query, reference))
    if query_vectors.shape[1] != reference_vectors.shape[1]:
        raise ValueError(
            f"the vectors of the query have {query_vectors.shape[1]} numbers, those of the reference "
            f"{reference_vectors.shape[1]}; embed both by one model"
        )
    return query_vectors, reference_vectors


def _reference_labels(
    reference: "AnnData", labels_key: str, ignore: Sequence[str], embedded: npt.NDArray[np.bool_], n_neighbors: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.str_]]:
    """Return which cells of the reference have a label and an embedding, (cells,), and the labels of these cells.

    Args:
        reference: see `transfer_labels`.
        labels_key: see `transfer_labels`.
        ignore: see `transfer_labels`.
        embedded: true at cells that have an embedding. Shape (cells,).
        n_neighbors: see `transfer_labels`.

    Raises:
        ValueError: there is no such column, too few cells are labelled, or all have the same label.
    """
    if labels_key not in reference.obs:
        raise ValueError(f"the reference has no obs[{labels_key!r}]; its columns are {list(reference.obs)}")
    column = reference.obs[labels_key]
    labelled = has_label(column, ignore) & embedded
    if labelled.sum() <= n_neighbors:
        raise ValueError(
            f"{labelled.sum():,} of {len(column):,} cells of the reference have a label in obs[{labels_key!r}], "
            f"expected more than the {n_neighbors} neighbors that vote; choose another column, or fewer neighbors"
        )
    labels = fill_missing(column[labelled]).to_numpy(str)
    if (labels == labels[0]).all():
        raise ValueError(
            f"all {len(labels):,} labelled cells of the reference have {str(labels[0])!r} in obs[{labels_key!r}], so "
            "every cell would get that label; use a reference with two labels or more"
        )
    return labelled, labels


def _usual_distance(classifier: KNeighborsClassifier, vectors: FloatArray, n_neighbors: int) -> float:
    """Return the mean distance to their neighbors that 1 % of the reference cells exceed."""
    sampled = np.random.default_rng(0).permutation(len(vectors))[:_DISTANCE_CELLS]
    # One neighbor more, because each of these cells is its own nearest neighbor.
    distance = classifier.kneighbors(vectors[sampled], n_neighbors + 1)[0][:, 1:]
    return float(np.quantile(distance.mean(axis=1), 0.99))


def _validate_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold in [0, 1], found {threshold}")


def _validate_free_columns(key: str, obs: pd.DataFrame, overwrite: bool) -> None:
    validate_name(key)
    existing = [name for name in (key, f"{key}_confidence", f"{key}_distance") if name in obs]
    if existing and not overwrite:
        raise ValueError(f"obs has {existing} already; choose another name, or overwrite them")
