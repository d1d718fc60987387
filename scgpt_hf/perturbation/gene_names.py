"""Find the vocabulary ids of the genes of a screen and of its perturbed genes.

Perturbed genes are named by symbol in most screens, and need not be among the measured genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.perturbation.conditions import Condition, require_genes
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


@dataclass(frozen=True, eq=False)
class ScreenGenes:
    """How the genes of a screen relate to the vocabulary of a model.

    Attributes:
        columns: columns of the screen whose genes are known, one for each gene. Shape (known genes,).
        ids: vocabulary id of each of these columns. Shape (known genes,).
        id_of_name: vocabulary id by name: genes of the vocabulary, its symbols, and names in the data.
        coverage: numbers of known and unknown genes; see `GeneMatch`.
    """

    columns: Int64Array
    ids: Int64Array
    id_of_name: dict[str, int]
    coverage: dict[str, int]

    def target_ids(self, condition: Condition) -> Int64Array:
        """Return the vocabulary ids of the perturbed genes. Shape (perturbed genes,).

        Raises:
            ValueError: a gene is unknown, or two names mean one gene.
        """
        require_genes(condition, self.id_of_name.keys(), "the model")
        ids = np.array([self.id_of_name[gene] for gene in condition], np.int64)
        if len(np.unique(ids)) < len(ids):
            raise ValueError(f"the condition {'+'.join(condition)!r} targets one gene twice under two names")
        return ids


def match_screen_genes(genes: pd.DataFrame, processor: ScGPTProcessor) -> ScreenGenes:
    """Match the genes of a screen to a vocabulary.

    Args:
        genes: `feature_id` and `feature_name` of each column.
        processor: holds the vocabulary.

    Raises:
        ValueError: too few genes are known.
    """
    match = match_source_genes(genes, processor)
    known = np.flatnonzero(match.gene_ids >= 0)
    columns = np.sort(known[np.unique(match.gene_ids[known], return_index=True)[1]])
    ids = match.gene_ids[columns]
    vocabulary = processor.tokenizer.get_vocab()
    id_of_name = dict(zip(genes["feature_name"].iloc[columns].astype(str), ids.tolist(), strict=True))
    symbols = processor.symbols or []
    resolved = processor.resolve_symbols(symbols)
    id_of_name |= {
        symbol: vocabulary[gene] for symbol, gene in zip(symbols, resolved, strict=True) if gene in vocabulary
    }
    id_of_name |= {gene: vocabulary[gene] for gene in processor.genes}
    return ScreenGenes(columns, ids, id_of_name, match.coverage)


def vocabulary_of_screen(genes: pd.DataFrame, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the genes and symbols of the vocabulary of a new model: those of the screen, then other perturbed genes.

    Args:
        genes: `feature_id` and `feature_name` of each column.
        targets: names of all genes that are perturbed, or will be.

    Returns:
        Names of the genes and their symbols, equally long.
    """
    ids, symbols = genes["feature_id"].astype(str), genes["feature_name"].astype(str)
    first = ~ids.duplicated()
    names, titles = ids[first].tolist(), symbols[first].tolist()
    known = {*names, *titles}
    others = sorted(set(targets) - known)
    return [*names, *others], [*titles, *others]
