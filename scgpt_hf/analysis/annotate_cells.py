"""`annotate`: annotate the cells of an AnnData, by a classifier or by a reference; the command `annotate` uses it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from transformers import PreTrainedModel

from scgpt_hf.analysis.annotate import PREDICTED, predict_cell_types, transfer_labels, validate_transfer
from scgpt_hf.analysis.embed import KEY, embed_anndata
from scgpt_hf.inference import InferenceSettings
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData


def annotate(
    adata: "AnnData",
    model: PreTrainedModel | str | Path | None = None,
    processor: ScGPTProcessor | None = None,
    *,
    reference: "AnnData | None" = None,
    labels_key: str = "cell_type",
    threshold: float = 0.5,
    key_added: str = PREDICTED,
    layer: str | None = None,
    round_counts: bool = False,
    overwrite: bool = False,
    transfer: dict[str, Any] | None = None,
    **settings: Unpack[InferenceSettings],
) -> dict[str, Any]:
    """Annotate cells with their types and write them to `adata.obs[key_added]`.

    Without a reference, `model` is a classifier that `finetune_classifier` trained; see `predict_cell_types`. With a
    reference, it is any pretrained model: it embeds both, and each cell gets the label of the nearest cells of the
    reference; see `transfer_labels`.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: folder or Hub repository, or a loaded model. None, with a reference, compares the embeddings that both
            have in `obsm["X_scgpt"]`.
        processor: the processor of a loaded model.
        reference: labelled cells with raw counts.
        labels_key: obs column of the reference with the labels.
        threshold: lowest confidence with which a cell gets its type, in [0, 1].
        key_added: name of the columns, and of the report in `uns`.
        layer: layer with the raw counts; by default it is found, see `open_source`.
        round_counts: round fractional counts.
        overwrite: replace columns and embeddings of these names.
        transfer: further arguments of `transfer_labels`, such as `n_neighbors`.
        settings: see `InferenceSettings`.

    Returns:
        The report that is also written to `adata.uns[key_added]`.

    Raises:
        ValueError: neither a model nor a reference is given, or an embedding exists; see also `predict_cell_types` and
            `transfer_labels`.

    Example:
        >>> report = annotate(adata, "runs/types/best_model")  # doctest: +SKIP
        >>> report = annotate(adata, "runs/demo/best_model", reference=reference, progress=False)
        >>> bool(adata.obs["predicted_cell_type"].notna().all())
        True
    """
    counts: dict[str, Any] = {"layer": layer, "round_counts": round_counts, "overwrite": overwrite}
    named: dict[str, Any] = {"threshold": threshold, "key_added": key_added}
    if reference is None:
        if model is None:
            raise ValueError("annotate needs a model that was fine-tuned, or a reference with labels; pass one of them")
        return predict_cell_types(adata, model, processor, **counts, **named, **settings)
    named |= {"labels_key": labels_key, "overwrite": overwrite}
    transfer = {"n_neighbors": 15, "ignore": ("unknown",), **(transfer or {})}
    checked: dict[str, Any] = {name: value for name, value in transfer.items() if name in ("n_neighbors", "ignore")}
    validate_transfer(adata, reference, **named, **checked)  # before cells are embedded
    if model is not None:
        if KEY in adata.obsm and not overwrite:
            raise ValueError(
                f"the query has an embedding obsm[{KEY!r}] already; use it and that of the reference (without "
                "--model), or replace it (--overwrite)"
            )
        loaded = load_model(model, processor)
        for cells in (reference, adata):
            embed_anndata(cells, *loaded, key_added=KEY, **counts, **settings)
    return transfer_labels(adata, reference, **named, **transfer)
