"""What a model has learned about genes: which are alike, which form programs, and which attend to which in a cell.

Embeddings belong to the model alone; attention belongs to the model and a cell. Neither is a regulatory network by
itself: two genes are near when the model treats them alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from transformers import PreTrainedModel

from scgpt_hf.analysis.inference import run_batches
from scgpt_hf.cells.source import open_source
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.pretrained import require_pair
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

Float32Array = npt.NDArray[np.float32]


@torch.inference_mode()
def gene_embeddings(model: PreTrainedModel, processor: ScGPTProcessor) -> pd.DataFrame:
    """Return the embedding of each gene of the vocabulary, as the encoder adds it to the value. Shape (genes, hidden).

    Raises:
        ValueError: model and processor do not belong together.
    """
    require_pair(model, processor)
    vocabulary = processor.tokenizer.get_vocab()
    ids = torch.tensor([vocabulary[gene] for gene in processor.genes], device=model.device)
    encoder: Any = model.base_model
    vectors = encoder.gene_encoder(ids)
    return pd.DataFrame(vectors.float().cpu().numpy(), index=processor.genes)


def nearest_genes(embeddings: pd.DataFrame, gene: str, n: int = 10) -> pd.Series:
    """Return the genes most like one, and their cosine similarity to it, the nearest first.

    Args:
        embeddings: one row per gene, as `gene_embeddings` returns them. Shape (genes, hidden).
        gene: its name among the rows.
        n: how many to return.

    Raises:
        ValueError: there is no such gene.
    """
    if gene not in embeddings.index:
        raise ValueError(f"{gene!r} is not among the {len(embeddings):,} genes, such as {list(embeddings.index[:3])}")
    unit = _unit_rows(embeddings)
    similarity = pd.Series(unit @ unit[embeddings.index.get_loc(gene)], index=embeddings.index, name="similarity")
    return similarity.drop(gene).nlargest(n)


def gene_programs(
    embeddings: pd.DataFrame, *, n_neighbors: int = 15, resolution: float = 1.0, seed: int = 0
) -> pd.Series:
    """Return the program of each gene: a cluster among the genes' nearest neighbours, by Leiden; 0 is the largest.

    Args:
        embeddings: one row per gene, of all genes or of those that matter. Shape (genes, hidden).
        n_neighbors: neighbours of each gene, by cosine similarity.
        resolution: higher gives more and smaller programs.
        seed: of Leiden.

    Raises:
        ImportError: `igraph` is not installed.
        ValueError: fewer than 4 genes.

    Source: Cui et al. 2024, Nature Methods 21:1470 (gene programs by Leiden on gene embeddings).
    """
    if len(embeddings) < 4:
        raise ValueError(f"programs need at least 4 genes, found {len(embeddings)}")
    import scanpy
    from anndata import AnnData
    from sklearn.neighbors import kneighbors_graph

    n_neighbors = min(n_neighbors, len(embeddings) - 1)
    nearest = kneighbors_graph(embeddings.to_numpy(), n_neighbors, metric="cosine")
    genes = AnnData(obs=pd.DataFrame(index=embeddings.index.astype(str)))
    scanpy.tl.leiden(
        genes,
        resolution=resolution,
        random_state=seed,
        adjacency=nearest.maximum(nearest.T),
        flavor="igraph",
        n_iterations=-1,
    )
    return pd.Series(genes.obs["leiden"].astype(int).to_numpy(), index=embeddings.index, name="program")


def attention_maps(
    adata: "AnnData",
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    genes: Sequence[str],
    *,
    layer: str | None = None,
    encoder_layer: int = -1,
    progress: bool = True,
) -> Float32Array:
    """Return how much each gene attends to each other in each cell, averaged over heads. Shape (cells, genes, genes).

    Row i, column j: the share of its attention that gene i gives to gene j. NaN where the cell does not express both,
    or has too many genes for the model to see them. One cell at a time, for the memory it takes grows with the square
    of a cell's genes.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: any scGPT model, on the device where it shall run.
        processor: the model's.
        genes: names in the model's vocabulary.
        layer: where the raw counts are, `X` by default.
        encoder_layer: which layer of the encoder, by default the last.
        progress: show a bar.

    Raises:
        ValueError: a gene is not in the vocabulary; or as `embed_anndata`.
        IndexError: there is no such layer.
    """
    known = processor.tokenizer.get_vocab()
    if unknown := [gene for gene in genes if gene not in known]:
        raise ValueError(f"{len(unknown)} of {len(genes)} genes are not in the model's vocabulary, e.g. {unknown[:5]}")
    wanted = torch.tensor([known[gene] for gene in genes], device=model.device)

    def compute(batch: Batch) -> torch.Tensor:
        weights: torch.Tensor = model.base_model(**batch, output_attentions=True).attentions[encoder_layer]
        among = weights[0].float().mean(dim=0)  # (tokens, tokens) of the one cell
        matches = wanted[:, None] == batch["input_ids"]  # (genes, tokens)
        at, shown = matches.int().argmax(dim=1), matches.any(dim=1)
        return among[at][:, at].masked_fill(~(shown[:, None] & shown), torch.nan)[None]

    source = open_source(adata, layer=layer, primary_only=False)
    cell_ids = source.obs().index.to_numpy(np.int64)
    with _eager(model):
        one_by_one = run_batches(
            compute, source, cell_ids, model, processor, batch_size=1, progress=progress, doing="attending"
        )
        return np.concatenate([among for _, among in one_by_one])


def mean_attention(maps: Float32Array, genes: Sequence[str], groups: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the mean map of each group of cells, over the cells that show both genes; NaN where none does.

    Args:
        maps: from `attention_maps`. Shape (cells, genes, genes).
        genes: names of its rows and columns.
        groups: e.g. the cell type of each cell. Shape (cells,).

    Raises:
        ValueError: shapes disagree.
    """
    if maps.shape != (len(groups), len(genes), len(genes)):
        raise ValueError(f"found maps of {maps.shape} for {len(groups)} cells and {len(genes)} genes")
    labels = np.asarray(groups)
    means = {}
    for group in sorted(set(labels.tolist())):
        own = maps[labels == group]
        n_shown = np.isfinite(own).sum(axis=0)
        mean = np.where(n_shown > 0, np.nansum(own, axis=0) / np.maximum(n_shown, 1), np.nan)
        means[group] = pd.DataFrame(mean, index=list(genes), columns=list(genes))
    return means


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute attention eagerly, which alone returns probabilities, and as before afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _unit_rows(embeddings: pd.DataFrame) -> Float32Array:
    vectors = embeddings.to_numpy(np.float32)
    unit: Float32Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
