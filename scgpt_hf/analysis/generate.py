"""Generate the expression of cells with a model of generative training: from a cell embedding, a prompt, or both.

A *prompt* is a cell with some of its genes measured. The genes to generate are queries, to which no other token
attends, so one round predicts each of them as if it were the only one. In several rounds, the genes whose predictions
are most certain become part of the prompt, with their predicted values, before the others are predicted again.
"""

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from transformers import AutoModelForPreTraining, PreTrainedModel

from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.inference import evaluation_mode, move_batch
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.pretrained import load_model
from scgpt_hf.progress_bar import progress_bar
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, pack
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "scgpt_generated"

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


class _Predictions(NamedTuple):
    """Predictions of the requested genes, each (cells, genes).

    Attributes:
        values: predicted values.
        doubt: how uncertain each prediction is; None if the model has no second head to compare with.
    """

    values: Float32Array
    doubt: Float32Array | None


def generate_cells(
    model: PreTrainedModel | str | Path,
    genes: Sequence[str],
    processor: ScGPTProcessor | None = None,
    *,
    cell_embedding: npt.ArrayLike | None = None,
    prompt: "AnnData | None" = None,
    rounds: int = 1,
    layer: str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> "AnnData":
    """Generate the expression of genes in cells that are described by an embedding, a prompt, or both.

    The model predicts how high a gene ranks among the expressed genes of the cell *if it is expressed*, as all models
    that are trained on expressed genes only.

    With several rounds, a prediction is certain if two heads agree: the doubt is `|GEP − GEPC|`, the difference between
    the predictions from the gene's state and from `<cls>`. For models that predict zeros explicitly it is the doubt
    whether the gene is expressed, min(p, 1 − p). scGPT's paper generates the most confident genes first without
    defining confidence; these are our definitions.

    Args:
        model: folder or Hub repository, or a loaded model for pretraining with `objective="generative"`, which runs on
            the device where it is.
        genes: genes to generate in every cell, by the model's name or symbol, each once.
        processor: the processor of a loaded model.
        cell_embedding: embedding of each cell, as `embed_anndata(..., normalize=False)` returns it; it takes the place
            of `<cls>`. Shape (cells, hidden).
        prompt: measured genes of each cell, raw counts. Counts of `genes` are not used.
        rounds: number of rounds; more take proportionally longer. 1 predicts all genes independently.
        layer: layer of the prompt with the raw counts; see `embed_anndata`.
        batch_size: cells per batch; changes speed and memory, not the result.
        progress: show a progress bar.

    Returns:
        An AnnData of cells × genes, cells as in the prompt. `X` holds the generated values in the unit of the model's
        input, `layers["round"]` the round in which each was fixed, from 1, and `uns["scgpt_generated"]` the model and
        the settings.

    Raises:
        ValueError: there is neither embedding nor prompt, their numbers of cells differ, the embedding has another
            width or is not finite, a gene is unknown or repeated, `rounds` is not between 1 and the number of genes,
            the model was not trained generatively, or has no second head for several rounds.

    Example:
        >>> model = "runs/generative/best_model"
        >>> report = embed_anndata(adata, model, normalize=False)  # doctest: +SKIP
        >>> cells = generate_cells(model, ["CD3D", "LYZ"], cell_embedding=adata.obsm["X_scgpt"])  # doctest: +SKIP
        >>> cells.X.shape  # doctest: +SKIP
        (700, 2)

    Source: generation of scGPT, Cui et al. 2024, Nature Methods 21:1470, methods.
    """
    model, processor = load_model(model, processor, AutoModelForPreTraining, heads=("expression_head",))
    if model.config.objective != "generative":
        raise ValueError(
            f"{model.name_or_path or 'this model'} was trained with objective={model.config.objective!r} and has no "
            "queries; pretrain with --objective generative, or predict masked genes with predict_expression"
        )
    asked = _gene_ids(genes, processor)
    _require_rounds(rounds, len(asked), model)
    given, obs, coverage = _read_prompt(prompt, asked, processor, layer)
    embedding = None if cell_embedding is None else _require_embedding(cell_embedding, model, given)
    if given is None and embedding is None:
        raise ValueError("nothing to generate from; pass cell_embedding, a prompt, or both")
    if given is None:
        assert embedding is not None
        given = _cls_only(len(embedding), processor)
    if obs is None:
        obs = pd.DataFrame(index=[str(cell) for cell in range(len(given))])
    values, fixed_in = np.empty((2, len(given), len(asked)), np.float32)
    with (
        torch.inference_mode(),
        evaluation_mode(model),
        progress_bar(total=len(given), unit="cells", description="generating", show=progress) as bar,
    ):
        for start in range(0, len(given), batch_size):
            cells = slice(start, min(start + batch_size, len(given)))
            vectors = None if embedding is None else embedding[cells]
            values[cells], fixed_in[cells] = _generate(model, processor, given[cells], vectors, asked, rounds)
            bar.update(cells.stop - start)
    return _to_anndata(values, fixed_in, obs, list(genes), _provenance(model, processor, rounds, embedding, coverage))


def _gene_ids(genes: Sequence[str], processor: ScGPTProcessor) -> Int64Array:
    """Return the vocabulary ids of the genes.

    Raises:
        ValueError: there is none, or a gene is unknown or repeated.
    """
    known, every_id = set(processor.genes), processor.tokenizer.get_vocab()
    vocabulary = {gene: every_id[gene] for gene in known}
    names = processor.resolve_symbols(genes)
    if unknown := [gene for gene, name in zip(genes, names, strict=True) if name not in vocabulary]:
        raise ValueError(
            f"the model does not know {len(unknown)} of the {len(names)} requested genes, e.g. {unknown[:5]}; its "
            f"genes, by id or symbol, are those of processor.genes, such as {processor.genes[:3]}"
        )
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more genes to generate, each once; found {list(genes)[:10]}")
    return np.array([vocabulary[name] for name in names], np.int64)


def _require_rounds(rounds: int, n_genes: int, model: PreTrainedModel) -> None:
    if not 1 <= rounds <= n_genes:
        raise ValueError(f"expected rounds from 1 to the number of genes, {n_genes}; found {rounds}")
    if rounds > 1 and not (model.config.explicit_zero_prob or model.config.has_objective("gepc")):
        raise ValueError(
            "several rounds need to know which predictions are certain, from the heads gep and gepc or from "
            "explicit_zero_prob; this model has neither, so pass rounds=1"
        )


def _require_embedding(cell_embedding: npt.ArrayLike, model: PreTrainedModel, given: Tokens | None) -> Float32Array:
    """Return the embedding of each cell as float32, (cells, hidden).

    Raises:
        ValueError: the width or the number of cells is another, or a number is not finite.
    """
    embedding = np.asarray(cell_embedding, np.float32)
    width = model.config.hidden_size
    if embedding.ndim != 2 or not len(embedding) or embedding.shape[1] != width:
        raise ValueError(f"expected cell_embedding of shape (cells, {width}), found {embedding.shape}")
    if not np.isfinite(embedding).all():
        raise ValueError("cell_embedding has values that are not finite; leave these cells out")
    if given is not None and len(given) != len(embedding):
        raise ValueError(f"cell_embedding has {len(embedding):,} cells, the prompt {len(given):,}; pass the same cells")
    return embedding


def _read_prompt(
    prompt: "AnnData | None", asked: Int64Array, processor: ScGPTProcessor, layer: str | None
) -> tuple[Tokens | None, pd.DataFrame | None, Any]:
    """Return the tokens of the prompt without the genes that are asked for, its obs, and its coverage of the genes."""
    if prompt is None:
        return None, None, None
    source = AnnDataSource(prompt, layer=layer, primary_only=False)
    match = match_source_genes(source.genes, processor)
    block = source.read(source.obs().index.to_numpy(np.int64), [])
    tokens = processor.tokenize(block, match.gene_ids, seed=0, epoch=0, ties="midpoint")
    if len(tokens) < prompt.n_obs:
        raise ValueError(
            f"{prompt.n_obs - len(tokens):,} of {prompt.n_obs:,} cells of the prompt express no gene of the model; "
            "leave them out"
        )
    kept = ~np.isin(tokens.input_ids, asked)
    return _select(tokens, kept), prompt.obs.copy(), match.coverage


def _select(tokens: Tokens, kept: npt.NDArray[np.bool_]) -> Tokens:
    """Return the tokens for which `kept`, bool (tokens,), is true."""
    indptr = np.concatenate([[0], np.cumsum(kept)])[tokens.indptr]
    return Tokens(tokens.input_ids[kept], tokens.values[kept], None, indptr, tokens.cell_ids)


def _cls_only(n_cells: int, processor: ScGPTProcessor) -> Tokens:
    """Return cells of which nothing but `<cls>` is given."""
    ids, values = np.full(n_cells, processor.cls_id), np.full(n_cells, processor.cls_value, np.float32)
    return Tokens(ids, values, None, np.arange(n_cells + 1), np.arange(n_cells))


def _generate(
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    given: Tokens,
    embedding: Float32Array | None,
    asked: Int64Array,
    rounds: int,
) -> tuple[Float32Array, Float32Array]:
    """Return the generated values of a batch of cells and the round in which each was fixed, both (cells, genes)."""
    shape = (len(given), len(asked))
    values, fixed_in = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for number in range(1, rounds + 1):
        predicted = _predict(model, _with_fixed(given, asked, values, fixed_in > 0), embedding, asked, processor)
        open_ = fixed_in == 0
        # The same number of genes is fixed in each round, in all cells; the last round fixes the rest.
        n_fixed = math.ceil(len(asked) * number / rounds) - math.ceil(len(asked) * (number - 1) / rounds)
        chosen = open_
        if predicted.doubt is not None and number < rounds:
            doubt = np.where(open_, predicted.doubt, np.inf)
            chosen = np.zeros(shape, np.bool_)
            np.put_along_axis(chosen, np.argsort(doubt, axis=1, kind="stable")[:, :n_fixed], True, axis=1)
        values[chosen], fixed_in[chosen] = _in_range(predicted.values[chosen], processor), number
    return values, fixed_in


def _in_range(values: Float32Array, processor: ScGPTProcessor) -> Float32Array:
    """Clip predicted values to those that the model's input can have."""
    highest = processor.n_bins - 1 if processor.input_style == "binned" else math.inf
    return np.clip(values, 0.0, highest).astype(np.float32)


def _with_fixed(given: Tokens, asked: Int64Array, values: Float32Array, fixed: npt.NDArray[np.bool_]) -> Tokens:
    """Return the given tokens of each cell, followed by its generated genes that are fixed, with their values."""
    lengths = np.diff(given.indptr)
    cells = np.concatenate([np.repeat(np.arange(len(given)), lengths), fixed.nonzero()[0]])
    order = np.argsort(cells, kind="stable")
    ids = np.concatenate([given.input_ids, np.broadcast_to(asked, fixed.shape)[fixed]])[order]
    indptr = np.concatenate([[0], np.cumsum(lengths + fixed.sum(axis=1))])
    return Tokens(ids, np.concatenate([given.values, values[fixed]])[order], None, indptr, given.cell_ids)


def _predict(
    model: PreTrainedModel,
    given: Tokens,
    embedding: Float32Array | None,
    asked: Int64Array,
    processor: ScGPTProcessor,
) -> _Predictions:
    """Predict the genes in every cell; genes beyond the number of tokens that the model takes in several batches.

    Queries do not attend to each other, so the batches do not change the result.
    """
    parts = [
        _predict_together(model, given, embedding, asked[start : start + processor.max_tokens], processor)
        for start in range(0, len(asked), processor.max_tokens)
    ]
    doubts = [part.doubt for part in parts if part.doubt is not None]
    return _Predictions(
        np.concatenate([part.values for part in parts], axis=1), np.concatenate(doubts, axis=1) if doubts else None
    )


def _predict_together(
    model: PreTrainedModel,
    given: Tokens,
    embedding: Float32Array | None,
    asked: Int64Array,
    processor: ScGPTProcessor,
) -> _Predictions:
    lengths = np.diff(given.indptr)
    ends = np.repeat(given.indptr[1:], len(asked))  # the queries follow the given tokens of their cell
    tokens = Tokens(
        np.insert(given.input_ids, ends, np.tile(asked, len(given))),
        np.insert(given.values, ends, np.float32(processor.mask_value)),
        np.insert(np.full(len(given.input_ids), IGNORE, np.float32), ends, np.float32(0)),
        np.concatenate([[0], np.cumsum(lengths + len(asked))]),
        given.cell_ids,
    )
    batch = pack(tokens, queries=True)
    del batch["labels"]  # they only mark the queries
    if embedding is not None:
        batch["input_cell_embedding"] = torch.from_numpy(embedding)
    output = model(**move_batch(batch, model.device))
    shape = (len(given), len(asked))
    gep, doubt = output.gep.float(), None
    if output.gep_zero is not None:
        expressed = torch.sigmoid(output.gep_zero.float())
        doubt = torch.minimum(expressed, 1 - expressed)
    elif output.gepc is not None:
        doubt = (gep - output.gepc.float()).abs()
    return _Predictions(gep.view(shape).cpu().numpy(), None if doubt is None else doubt.view(shape).cpu().numpy())


def _provenance(
    model: PreTrainedModel, processor: ScGPTProcessor, rounds: int, embedding: Float32Array | None, coverage: Any
) -> dict[str, Any]:
    found = {
        "model": model.name_or_path,
        "scgpt_hf": version("scgpt_hf"),
        "unit": "bins" if processor.input_style == "binned" else "log1p",
        "rounds": rounds,
        "cell_embedding": embedding is not None,
        "genes_of_prompt": coverage,
    }
    return {name: value for name, value in found.items() if value is not None}


def _to_anndata(
    values: Float32Array, fixed_in: Float32Array, obs: pd.DataFrame, genes: list[str], provenance: dict[str, Any]
) -> "AnnData":
    from anndata import AnnData

    layers = {"round": fixed_in.astype(np.int32)}
    return AnnData(values, obs=obs, var=pd.DataFrame(index=genes), layers=layers, uns={KEY: provenance})
