"""Predict the expression of genes that are masked, from the other genes of the cell.

Each gene is masked once, in groups as in pretraining, and predicted from its own hidden state (GEP) and from `<cls>`
(GEPC). `masked_views.py` decides which genes are masked and visible; `inverse_binning.py` turns predicted bins into
counts.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.sparse import csr_matrix, vstack
from transformers import AutoModelForPreTraining, PreTrainedModel

from scgpt_hf.analysis.inverse_binning import bins_to_counts, log1p_to_counts
from scgpt_hf.analysis.masked_views import join_tokens, make_masked_views
from scgpt_hf.cells.block import CHUNK_SIZE, Int64Array
from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.inference import evaluation_mode, move_batch
from scgpt_hf.pipeline.genes import GeneMatch, match_source_genes
from scgpt_hf.pipeline.stream import CellStream, StreamConfig, TokenizedCells
from scgpt_hf.pretrained import load_model
from scgpt_hf.progress_bar import progress_bar
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, pack
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.targets_scgpt import leave_out_masked

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "scgpt_expression"
HEADS = {"gep": "expression_head", "gepc": "cell_to_gene_head"}  # output of the model → module that computes it

Layers = dict[str, csr_matrix]  # by name, each (cells, genes)
Outputs = dict[str, npt.NDArray[Any]]  # by name, each (predictions,)


def predict_expression(
    adata: "AnnData",
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    *,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    round_counts: bool = False,
    masked_share: float = 0.25,
    batch_size: int = 64,
    progress: bool = True,
) -> "AnnData":
    """Predict genes that are masked from the other genes of the same cell, in bins and in counts.

    A model trained on expressed genes only, as scGPT's models are, predicts how high a gene ranks among the expressed
    genes of a cell *if it is expressed*; it does not predict whether it is. Bins are computed over all expressed genes
    of a cell, the masked ones included, as in pretraining.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: folder or Hub repository, or a loaded model for pretraining, which runs on the device where it is.
        processor: the processor of a loaded model.
        genes: genes to predict in every cell, by the model's name or by the symbol in the data; the data need not have
            them. By default the genes that each cell expresses, to compare with the measurement.
        layer: layer with the raw counts; by default `X`, or the only other one that has them, see `AnnDataSource`.
        round_counts: round fractional counts.
        masked_share: number of genes masked together, as a share of the genes that the model can see of the cell. 0.25
            is the smallest share in pretraining.
        batch_size: masked views of cells per batch; changes speed and memory, not the result.
        progress: show a progress bar.

    Returns:
        An AnnData of cells × genes, cells as in `adata`. It is sparse, with entries where a cell expresses a gene,
        unless `genes` are given. For each of the heads `gep` and `gepc` that the model has, the layer of that name
        holds predicted bins, `…_counts` the corresponding counts in the cell and, for models that predict zeros
        explicitly, `…_expressed` the probability that the gene is expressed. `bins` holds the measured bins, NaN where
        the data lack the gene. `X` holds the counts of the first head, and `uns["scgpt_expression"]` the model and the
        settings.

    Raises:
        ValueError: there is no cell, the counts are not raw, too few genes are in the vocabulary, a cell expresses
            none of them, a requested gene is unknown or repeated, the model has no trained expression head, or the
            share is not in (0, 1].

    Example:
        >>> predicted = predict_expression(adata, "runs/demo/best_model", genes=["CD3D", "LYZ"])
        >>> predicted.layers["gep_counts"].shape
        (700, 2)
    """
    if not 0 < masked_share <= 1:
        raise ValueError(f"expected masked_share in (0, 1], found {masked_share}; pretraining masks 0.25, 0.5 or 0.75")
    source = AnnDataSource(adata, layer=layer, primary_only=False, round_counts=round_counts)
    heads = tuple(HEADS.values())
    model, processor = load_model(model, processor, AutoModelForPreTraining, heads=heads)
    gene_match = match_source_genes(source.genes, processor)
    gene_ids = gene_match.gene_ids
    var = _requested_genes(genes, source.genes, gene_ids, processor)
    columns = var.pop("input_id").to_numpy(np.int64)
    cell_ids = source.obs().index.to_numpy(np.int64)
    parts: list[Layers] = []
    with (
        closing(_read_tokens(source, cell_ids, gene_match, processor)) as chunks,
        progress_bar(total=len(cell_ids), unit="cells", description="predicting", show=progress) as bar,
    ):
        for cells in chunks:
            requested = None if genes is None else columns
            views = make_masked_views(cells.tokens, requested, processor, masked_share=masked_share)
            layers = _to_layers(_run_views(model, views, batch_size), cells.tokens, columns)
            counts = cells.block.take(cells.rows).counts
            for head in [name for name in HEADS if name in layers]:
                layers[f"{head}_counts"] = _to_counts(layers[head], counts, gene_ids, columns, processor)
            parts.append(layers)
            bar.update(len(cells.rows))
    joined = {name: vstack([layers[name] for layers in parts], format="csr") for name in parts[0]}
    provenance = {
        "model": model.name_or_path,
        "scgpt_hf": version("scgpt_hf"),
        **{name: value for name, value in source.describe().items() if name in ("layer", "round_counts")},
        "genes": gene_match.coverage,
        "masked_share": masked_share,
        "max_tokens": processor.max_tokens,
    }
    return _to_anndata(joined, adata.obs, var, provenance, dense=genes is not None)


def _read_tokens(
    source: CellSource, cell_ids: Int64Array, gene_match: GeneMatch, processor: ScGPTProcessor
) -> Generator[TokenizedCells, None, None]:
    """Read cells with every known gene that they express, ties in the middle of their bins, a chunk at a time."""
    config = StreamConfig(
        seed=0, ties="midpoint", max_tokens=processor.vocab_size, key_by="content", empty_cells="raise"
    )
    plan = plan_validation(cell_ids, CHUNK_SIZE, cells_per_window=CHUNK_SIZE)
    stream = CellStream(source, [plan], processor, config, gene_match=gene_match)
    return prefetch(stream.tokenized(), depth=1)


def _requested_genes(
    genes: Sequence[str] | None, known: pd.DataFrame, gene_ids: Int64Array, processor: ScGPTProcessor
) -> pd.DataFrame:
    """Return the genes to predict, indexed by the names in the request: `feature_name`, `in_data`, `input_id`.

    Raises:
        ValueError: there is none, or a gene is unknown or repeated.
    """
    columns = np.flatnonzero(gene_ids >= 0)
    columns = columns[np.sort(np.unique(gene_ids[columns], return_index=True)[1])]  # the first column of each gene
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
                f"the model does not know {len(unknown)} of the {len(names)} requested genes, e.g. {unknown[:5]}; its "
                f"genes are such as {processor.genes[:3]}, and symbols work for genes that the data have"
            )
        ids = np.array([by_name[name] for name in names], np.int64)
        if not names or len(set(ids.tolist())) < len(ids):
            raise ValueError(f"expected one or more genes to predict, each once; found {names[:10]}")
    feature_names = [symbols.get(index, "") for index in ids.tolist()]
    return pd.DataFrame(
        {"feature_name": feature_names, "in_data": np.isin(ids, gene_ids), "input_id": ids}, index=names
    )


@torch.inference_mode()
def _run_views(model: PreTrainedModel, views: Iterator[Tokens], batch_size: int) -> Outputs:
    """Run the model over masked views and return one entry per masked gene.

    Returns:
        `cell` and `gene` of each masked gene, and the output of each head by its name. Each of shape (predictions,).
    """
    found: dict[str, list[npt.NDArray[Any]]] = {}
    with evaluation_mode(model):
        while group := list(islice(views, batch_size)):
            tokens = join_tokens(group)
            masked = np.flatnonzero(tokens.labels != IGNORE)
            if model.config.leave_out_masked:
                visible, left_out = leave_out_masked(tokens)
                batch = pack(visible) | left_out.as_batch()
            else:
                batch = pack(tokens, queries=model.config.objective == "generative")
            del batch["labels"]  # they only mark the masked genes; there is no loss to compute
            output = model(**move_batch(batch, model.device))
            outputs = {
                "cell": np.repeat(tokens.cell_ids, np.diff(tokens.indptr))[masked],
                "gene": tokens.input_ids[masked],
            }
            for head in [name for name in HEADS if name in output]:  # a head that a model lacks is not in its output
                outputs[head] = output[head].float().cpu().numpy()
                if (zero := output.get(f"{head}_zero")) is not None:
                    outputs[f"{head}_expressed"] = torch.sigmoid(zero.float()).cpu().numpy()
            for name, values in outputs.items():
                found.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def _to_layers(outputs: Outputs, tokens: Tokens, columns: Int64Array) -> Layers:
    """Arrange the outputs of `_run_views`, and the measured `bins`, as matrices of cells × requested genes.

    Args:
        outputs: outputs that `_run_views` has returned.
        tokens: all genes of the cells, unmasked.
        columns: vocabulary ids of the requested genes. Shape (genes,).
    """
    # Vocabulary id → column of the result; -1 for genes that were not requested and for `<cls>`.
    column_of_gene = np.full(max(tokens.input_ids.max(), columns.max()) + 1, -1)
    column_of_gene[columns] = np.arange(len(columns))
    measured = column_of_gene[tokens.input_ids] >= 0
    cell_of_token = np.repeat(np.arange(len(tokens)), np.diff(tokens.indptr))
    entries = {
        name: (values, outputs["cell"], outputs["gene"])
        for name, values in outputs.items()
        if name not in ("cell", "gene")
    }
    entries["bins"] = tokens.values[measured], cell_of_token[measured], tokens.input_ids[measured]
    shape = (len(tokens), len(columns))
    return {
        name: csr_matrix((values, (cells, column_of_gene[genes])), shape=shape)
        for name, (values, cells, genes) in entries.items()
    }


def _to_counts(
    predicted: csr_matrix,
    counts: csr_matrix,
    gene_ids: Int64Array,
    columns: Int64Array,
    processor: ScGPTProcessor,
) -> csr_matrix:
    """Return the counts that predicted values correspond to, cell by cell. Shape (cells, requested genes)."""
    known = csr_matrix(counts[:, gene_ids >= 0])
    ids = gene_ids[gene_ids >= 0][known.indices]
    known = csr_matrix((known.data, ids, known.indptr), shape=(counts.shape[0], processor.vocab_size))
    known.sum_duplicates()  # of columns of one gene
    if processor.modalities is not None:
        return _to_counts_by_modality(predicted, counts, known, gene_ids, columns, processor)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    return _invert(predicted, known, totals, processor)


def _to_counts_by_modality(
    predicted: csr_matrix,
    counts: csr_matrix,
    known: csr_matrix,
    gene_ids: Int64Array,
    columns: Int64Array,
    processor: ScGPTProcessor,
) -> csr_matrix:
    """Return counts that predicted values correspond to among the counts of their modality, NaN where it has none."""
    result = predicted.copy()
    modality_of_gene = processor.modality_ids(processor.modality_names)
    of_column = np.where(gene_ids >= 0, modality_of_gene[gene_ids], 0)
    for modality in range(len(processor.modality_names) - 2):
        own = modality_of_gene[columns] == modality
        totals = np.asarray(counts[:, of_column == modality].sum(axis=1)).ravel()
        measured = known.copy()
        measured.data = measured.data * (modality_of_gene[measured.indices] == modality)
        measured.eliminate_zeros()
        entries = own[result.indices]
        result.data[entries] = _invert(predicted, measured, totals, processor).data[entries]
    return result


def _invert(
    predicted: csr_matrix, known: csr_matrix, totals: npt.NDArray[Any], processor: ScGPTProcessor
) -> csr_matrix:
    """Return the counts that predicted values correspond to, given measured counts and the totals of the cells."""
    result = predicted.copy()
    for cell, (start, stop) in enumerate(pairwise(predicted.indptr)):  # the edges of the bins differ between cells
        values, expressed = predicted.data[start:stop], known.data[slice(*known.indptr[cell : cell + 2])]
        if not len(expressed):
            result.data[start:stop] = np.nan  # nothing is measured that would say what a bin is in counts
        elif processor.input_style == "binned":
            result.data[start:stop] = bins_to_counts(values, expressed, processor.n_bins)
        else:
            result.data[start:stop] = log1p_to_counts(values, totals[cell], processor.target_sum)
    return result


def _to_anndata(
    layers: Layers, obs: pd.DataFrame, var: pd.DataFrame, provenance: dict[str, Any], *, dense: bool
) -> "AnnData":
    """Return the result as an AnnData, dense if every gene was predicted in every cell."""
    from anndata import AnnData

    matrices: dict[str, Any] = dict(layers)
    if dense:
        matrices = {name: matrix.toarray() for name, matrix in layers.items()}
        matrices["bins"][:, ~var["in_data"].to_numpy()] = np.nan
    first = next(name for name in matrices if name.endswith("_counts"))
    return AnnData(matrices[first].copy(), obs=obs.copy(), var=var, layers=matrices, uns={KEY: provenance})
