"""Analyze what a model has learned about genes: similar genes, gene programs, and attention between genes in a cell.

Gene embeddings depend on the model alone, attention on the model and the cell. Neither is a regulatory network: two
genes are close when the model treats them alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.inference import Float32Array, iterate_outputs
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.pretrained import validate_pair
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData


@torch.inference_mode()
def gene_embeddings(model: PreTrainedModel, processor: ScGPTProcessor) -> pd.DataFrame:
    """Return the embedding of each gene of the vocabulary, as the encoder adds it to the embedding of the value.

    Args:
        model: any scGPT model.
        processor: the processor of the model.

    Returns:
        One row per gene, indexed by gene, by ascending vocabulary id. Shape (genes, hidden).

    Raises:
        ValueError: model and processor do not fit together.

    Example:
        >>> model, processor = load_model("runs/demo/best_model")
        >>> gene_embeddings(model, processor).shape
        (765, 64)
    """
    validate_pair(model, processor)
    vocabulary = processor.tokenizer.get_vocab()
    ids = torch.tensor([vocabulary[gene] for gene in processor.genes], device=model.device)
    encoder: Any = model.base_model
    vectors = encoder.gene_encoder(ids)
    return pd.DataFrame(vectors.float().cpu().numpy(), index=processor.genes)


def nearest_genes(embeddings: pd.DataFrame, gene: str, n: int = 10) -> pd.Series:
    """Return the genes that are most similar to one gene, by cosine similarity of their embeddings.

    Args:
        embeddings: one row per gene, as `gene_embeddings` returns them. Shape (genes, hidden).
        gene: name of the gene, one of the rows.
        n: number of genes to return.

    Returns:
        Similarities, indexed by gene, highest first. Shape (n,).

    Raises:
        ValueError: there is no such gene.

    Example:
        >>> list(nearest_genes(gene_embeddings(model, processor), "CD3D", n=3).index)  # doctest: +SKIP
        ['CD3E', 'CD3G', 'IL32']
    """
    if gene not in embeddings.index:
        raise ValueError(f"{gene!r} is not among the {len(embeddings):,} genes, such as {list(embeddings.index[:3])}")
    unit = _unit_rows(embeddings)
    similarity = pd.Series(unit @ unit[embeddings.index.get_loc(gene)], index=embeddings.index, name="similarity")
    return similarity.drop(gene).nlargest(n)


def gene_programs(
    embeddings: pd.DataFrame, *, n_neighbors: int = 15, resolution: float = 1.0, seed: int = 0
) -> pd.Series:
    """Cluster genes into programs, by Leiden on the graph of nearest neighbors of their embeddings.

    Args:
        embeddings: one row per gene, of all genes or of a subset. Shape (genes, hidden).
        n_neighbors: number of neighbors of each gene, by cosine similarity.
        resolution: higher values give more and smaller programs.
        seed: seed of Leiden.

    Returns:
        Number of the program of each gene, indexed by gene; 0 is the largest program. Shape (genes,).

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
        adjacency=nearest.maximum(nearest.T),  # an edge if either gene is among the neighbors of the other
        flavor="igraph",
        n_iterations=-1,  # iterate until the clusters no longer change
    )
    return pd.Series(genes.obs["leiden"].astype(int).to_numpy(), index=embeddings.index, name="program")


def attention_maps(
    adata: "AnnData",
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    genes: Sequence[str],
    *,
    layer: str | None = None,
    round_counts: bool = False,
    encoder_layer: int = -1,
    progress: bool = True,
) -> Float32Array:
    """Compute how much genes attend to each other in each cell, averaged over attention heads.

    Cells are processed one at a time, because the memory for attention grows with the square of a cell's genes.

    Args:
        adata: raw counts; genes by Ensembl id or symbol.
        model: any scGPT model; it runs on the device where it is.
        processor: the processor of the model.
        genes: names in the model's vocabulary.
        layer: layer with the raw counts; by default `X`, or the only other one that has them, see `AnnDataSource`.
        round_counts: round fractional counts.
        encoder_layer: index of the layer of the encoder, by default the last.
        progress: show a progress bar.

    Returns:
        Attention, float32 (cells, genes, genes). Row i, column j is the share of its attention that gene i pays to gene
        j. It is NaN where the cell does not express both genes, or where it has too many genes and one of the two was
        not sampled.

    Raises:
        ValueError: a gene is not in the vocabulary; see also `embed_anndata`.
        IndexError: there is no such layer.
    """
    known = processor.tokenizer.get_vocab()  # gene → id
    if unknown := [gene for gene in genes if gene not in known]:
        raise ValueError(f"{len(unknown)} of {len(genes)} genes are not in the model's vocabulary, e.g. {unknown[:5]}")
    requested = torch.tensor([known[gene] for gene in genes], device=model.device)

    def compute(batch: Batch) -> torch.Tensor:
        weights: torch.Tensor = model.base_model(**batch, output_attentions=True).attentions[encoder_layer]
        attention = weights[0].float().mean(dim=0)  # (tokens, tokens) of the one cell
        matches = requested[:, None] == batch["input_ids"]  # (genes, tokens)
        token, present = matches.int().argmax(dim=1), matches.any(dim=1)  # position of each gene; 0 if absent
        return attention[token][:, token].masked_fill(~(present[:, None] & present), torch.nan)[None]

    source = AnnDataSource(adata, layer=layer, primary_only=False, round_counts=round_counts)
    cell_ids = source.obs().index.to_numpy(np.int64)
    with _eager_attention(model):
        cells = iterate_outputs(
            compute, source, cell_ids, model, processor, batch_size=1, progress=progress, description="attention"
        )
        return np.concatenate([attention for _, attention in cells])


def mean_attention(maps: Float32Array, genes: Sequence[str], groups: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Average attention maps over groups of cells.

    Args:
        maps: maps that `attention_maps` has returned. Shape (cells, genes, genes).
        genes: names of the rows and columns of a map.
        groups: group of each cell, e.g. its type. Shape (cells,).

    Returns:
        Group → mean over the cells in which both genes are present; NaN where there is no such cell.

    Raises:
        ValueError: shapes disagree.
    """
    if maps.shape != (len(groups), len(genes), len(genes)):
        raise ValueError(f"found maps of {maps.shape} for {len(groups)} cells and {len(genes)} genes")
    labels = np.asarray(groups)
    means = {}
    for group in sorted(set(labels.tolist())):
        own = maps[labels == group]
        n_present = np.isfinite(own).sum(axis=0)
        mean = np.where(n_present > 0, np.nansum(own, axis=0) / np.maximum(n_present, 1), np.nan)
        means[group] = pd.DataFrame(mean, index=list(genes), columns=list(genes))
    return means


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch to the eager implementation, the only one that returns attention weights, and restore it afterwards."""
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
