"""Genes filled in: what the model expects of a gene that it is not shown, from the other genes of the cell.

Each gene is hidden once, in groups as in pretraining, and predicted from its own state (GEP) and from `<cls>` (GEPC).
`masked_views.py` decides what is hidden and what is seen; `inverse_binning.py` turns predicted bins into counts.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.sparse import csr_matrix, vstack
from tqdm import tqdm
from transformers import AutoModelForPreTraining, PreTrainedModel

from scgpt_hf.analysis.inverse_binning import counts_of_bins, counts_of_log1p
from scgpt_hf.analysis.masked_views import hide_in_turn, join_tokens
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.schedule.epoch import CHUNK_SIZE
from scgpt_hf.cells.source import open_source
from scgpt_hf.pipeline.genes import match_columns
from scgpt_hf.pretrained import load_pretrained, require_pair
from scgpt_hf.tokens.packing_scgpt import Tokens, pack
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "scgpt_expression"
HEADS = {"gep": "expression_head", "gepc": "cell_to_gene_head"}  # output of the model: the module that makes it

Layers = dict[str, csr_matrix]  # by name, each (cells, genes)


def predict_expression(
    adata: "AnnData",
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    hidden_share: float = 0.25,
    batch_size: int = 64,
    progress: bool = True,
) -> "AnnData":
    """Return what the model expects of genes that it is not shown, cells as in `adata`, in bins and in counts.

    A model trained on expressed genes only, as scGPT's are, says how high a gene ranks among a cell's expressed genes
    *if it is expressed*; it does not say whether it is. Bins are those of all expressed genes of a cell, the hidden
    ones among them, as in pretraining.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: folder or Hub repository, or a loaded model for pretraining, on the device where it shall run.
        processor: of a loaded model.
        genes: which genes to predict in every cell, by the model's name for them or by the data's symbol; the data need
            not have them. By default each cell's own expressed genes, to compare with what was measured.
        layer: where the raw counts are, `X` by default.
        hidden_share: how many genes are hidden at once, as a share of those that the model can see of the cell. 0.25 is
            the smallest share in pretraining.
        batch_size: how many looks at cells the model takes at once; changes speed and memory, not the result.
        progress: show a bar.

    Returns:
        An AnnData of cells × genes; sparse, with entries where a cell expresses a gene, unless `genes` are given. For
        each of the heads `gep` and `gepc` that the model has, the layer of that name holds predicted bins, `…_counts`
        the counts that these stand for in the cell, and with explicit zeros `…_expressed` the probability that the gene
        is expressed. `bins` holds what was measured, NaN where the data lack the gene; `X` the counts of the first
        head; `uns["scgpt_expression"]` how it was made.

    Raises:
        ValueError: there is no cell, the counts are not raw, too few genes are known to the model, a cell expresses
            none of them, a gene asked for is unknown or repeated, the model predicts no expression, or the share is not
            in (0, 1].
    """
    if not 0 < hidden_share <= 1:
        raise ValueError(f"expected hidden_share in (0, 1], found {hidden_share}; pretraining hides 0.25, 0.5 or 0.75")
    source = open_source(adata, layer=layer, primary_only=False)
    model, processor = _load_predictor(model, processor)
    gene_ids, coverage = match_columns(source.genes, processor)
    var = _genes_asked(genes, source.genes, gene_ids, processor)
    columns = var.pop("input_id").to_numpy(np.int64)
    asked = None if genes is None else columns
    cell_ids, blocks = source.obs().index.to_numpy(np.int64), []
    with tqdm(total=len(cell_ids), unit="cell", desc="predicting", disable=not progress) as bar:
        for ids in np.split(cell_ids, range(CHUNK_SIZE, len(cell_ids), CHUNK_SIZE)):
            counts = source.read(ids).counts
            tokens = _all_tokens(counts, gene_ids, processor)
            looks = hide_in_turn(tokens, asked, processor, share=hidden_share)
            layers = _spread(_ask(model, looks, batch_size), tokens, columns)
            for head in [name for name in HEADS if name in layers]:
                layers[f"{head}_counts"] = _to_counts(layers[head], counts, gene_ids, processor)
            blocks.append(layers)
            bar.update(len(ids))
    whole = {name: vstack([layers[name] for layers in blocks], format="csr") for name in blocks[0]}
    provenance = {
        "model": model.name_or_path,
        "scgpt_hf": version("scgpt_hf"),
        "layer": source.describe()["layer"],
        "genes": coverage,
        "hidden_share": hidden_share,
        "max_tokens": processor.max_tokens,
    }
    return _as_anndata(whole, adata.obs, var, provenance, dense=genes is not None)


def _load_predictor(
    model: PreTrainedModel | str | Path, processor: ScGPTProcessor | None
) -> tuple[PreTrainedModel, ScGPTProcessor]:
    """Return a model with trained heads that predict expression, and its processor."""
    if isinstance(model, str | Path):
        name = model
        model, saved, new = load_pretrained(name, AutoModelForPreTraining)
        if lost := sorted(set(HEADS.values()) & set(new)):
            raise ValueError(f"{name} has no trained {' and no '.join(lost)}; predict with a pretrained model")
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        processor = processor or saved
    if processor is None:
        raise ValueError("a loaded model needs its processor; pass both, or the folder or repository they come from")
    require_pair(model, processor)
    if all(getattr(model, head, None) is None for head in HEADS.values()):
        raise ValueError(
            f"{type(model).__name__} has no head that predicts expression; load the pretrained checkpoint with "
            "AutoModelForPreTraining"
        )
    return model, processor


def _genes_asked(
    genes: Sequence[str] | None, known: pd.DataFrame, gene_ids: Int64Array, processor: ScGPTProcessor
) -> pd.DataFrame:
    """Return the genes to predict, indexed as they are asked for: `feature_name`, `in_data`, and `input_id`."""
    columns = np.flatnonzero(gene_ids >= 0)
    symbols = dict(zip(gene_ids[columns].tolist(), known["feature_name"].iloc[columns].astype(str), strict=True))
    if genes is None:
        ids, names = gene_ids[columns], known["feature_id"].iloc[columns].tolist()
    else:
        vocabulary, names = processor.tokenizer.get_vocab(), list(genes)
        by_name = {symbol: gene for gene, symbol in symbols.items()} | {
            gene: vocabulary[gene] for gene in processor.genes
        }
        if unknown := [name for name in names if name not in by_name]:
            raise ValueError(
                f"the model does not know {len(unknown)} of the {len(names)} genes asked for, e.g. {unknown[:5]}; its "
                f"genes are such as {processor.genes[:3]}, and a symbol is understood where the data have the gene"
            )
        ids = np.array([by_name[name] for name in names], np.int64)
        if not names or len(set(ids.tolist())) < len(ids):
            raise ValueError(f"expected genes to predict, each once; found {names[:10]}")
    feature_names = [symbols.get(index, "") for index in ids.tolist()]
    return pd.DataFrame(
        {"feature_name": feature_names, "in_data": np.isin(ids, gene_ids), "input_id": ids}, index=names
    )


def _all_tokens(counts: csr_matrix, gene_ids: Int64Array, processor: ScGPTProcessor) -> Tokens:
    """Return every known gene that each cell expresses, ties in the middle of their bins."""
    if n_empty := int((processor.count_known(counts, gene_ids) == 0).sum()):
        raise ValueError(f"{n_empty:,} cells express no gene that the model knows; leave them out")
    processor = copy(processor)
    processor.ties, processor.max_tokens = "midpoint", processor.vocab_size
    return processor.tokenize(counts, gene_ids, seed=0, epoch=0)


@torch.inference_mode()
def _ask(model: PreTrainedModel, looks: Iterator[Tokens], batch_size: int) -> dict[str, npt.NDArray[Any]]:
    """Return everything hidden by `cell` and `gene`, and what each head says of it by name. Each of shape (hidden,)."""
    found: dict[str, list[npt.NDArray[Any]]] = {}
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        while group := list(islice(looks, batch_size)):
            tokens = join_tokens(group)
            batch = pack(tokens)
            del batch["labels"]  # there is nothing to learn
            hidden = batch["label_positions"].numpy()
            output = model(**{k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
            said = {
                "cell": np.repeat(tokens.cell_ids, np.diff(tokens.indptr))[hidden],
                "gene": tokens.input_ids[hidden],
            }
            for head in [name for name in HEADS if name in output]:  # what a model lacks is left out of its output
                said[head] = output[head].float().cpu().numpy()
                if (zero := output.get(f"{head}_zero")) is not None:
                    said[f"{head}_expressed"] = torch.sigmoid(zero.float()).cpu().numpy()
            for name, values in said.items():
                found.setdefault(name, []).append(values)
    finally:
        model.train(training)
    return {name: np.concatenate(values) for name, values in found.items()}


def _spread(said: dict[str, npt.NDArray[Any]], tokens: Tokens, columns: Int64Array) -> Layers:
    """Return what was said, and the measured `bins`, as matrices with one column per gene of the result."""
    place = np.full(max(tokens.input_ids.max(), columns.max()) + 1, -1)
    place[columns] = np.arange(len(columns))
    measured = place[tokens.input_ids] >= 0
    cell_of_token = np.repeat(np.arange(len(tokens)), np.diff(tokens.indptr))
    entries = {
        name: (values, said["cell"], said["gene"]) for name, values in said.items() if name not in ("cell", "gene")
    }
    entries["bins"] = tokens.values[measured], cell_of_token[measured], tokens.input_ids[measured]
    shape = (len(tokens), len(columns))
    return {
        name: csr_matrix((values, (cells, place[genes])), shape=shape)
        for name, (values, cells, genes) in entries.items()
    }


def _to_counts(
    predicted: csr_matrix, counts: csr_matrix, gene_ids: Int64Array, processor: ScGPTProcessor
) -> csr_matrix:
    """Return the counts for which predicted values stand, cell by cell."""
    known = csr_matrix(counts[:, gene_ids >= 0])
    totals = np.asarray(counts.sum(axis=1)).ravel()
    result = predicted.copy()
    for cell, (start, stop) in enumerate(pairwise(predicted.indptr)):  # each cell has edges of its own
        values, own = predicted.data[start:stop], known.data[slice(*known.indptr[cell : cell + 2])]
        if processor.input_style == "binned":
            result.data[start:stop] = counts_of_bins(values, own, processor.n_bins)
        else:
            result.data[start:stop] = counts_of_log1p(values, totals[cell], processor.target_sum)
    return result


def _as_anndata(
    layers: Layers, obs: pd.DataFrame, var: pd.DataFrame, provenance: dict[str, Any], *, dense: bool
) -> "AnnData":
    """Return the result; dense where every gene was predicted in every cell, with NaN for what was not measured."""
    from anndata import AnnData

    matrices: dict[str, Any] = dict(layers)
    if dense:
        matrices = {name: matrix.toarray() for name, matrix in layers.items()}
        matrices["bins"][:, ~var["in_data"].to_numpy()] = np.nan
    first = next(name for name in matrices if name.endswith("_counts"))
    return AnnData(matrices[first].copy(), obs=obs.copy(), var=var, layers=matrices, uns={KEY: provenance})
