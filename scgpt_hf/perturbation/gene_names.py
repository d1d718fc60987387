"""Find the vocabulary ids of the genes of a screen and of its perturbed genes, and add genes that a model lacks.

Perturbed genes are named by symbol in most screens, and need not be among the measured genes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

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


def lacking_genes(
    genes: pd.DataFrame, targets: Sequence[str], processor: ScGPTProcessor
) -> tuple[list[str], list[str]]:
    """Return the genes and symbols of a screen, measured or perturbed, that a vocabulary lacks.

    A gene whose symbol is taken gets its name as its symbol, so that the symbol keeps its meaning.

    Args:
        genes: `feature_id` and `feature_name` of each column.
        targets: names of all genes that are perturbed.
        processor: holds the vocabulary.
    """
    names, symbols = vocabulary_of_screen(genes, targets)
    every = pd.DataFrame({"feature_id": names, "feature_name": symbols})
    unknown = np.flatnonzero(match_source_genes(every, processor).gene_ids < 0)
    taken = {*processor.genes, *(processor.symbols or [])}
    return (
        [names[gene] for gene in unknown],
        [names[gene] if symbols[gene] in taken else symbols[gene] for gene in unknown],
    )


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


def add_genes(model: Any, processor: ScGPTProcessor, names: Sequence[str], symbols: Sequence[str]) -> ScGPTProcessor:
    """Add genes to a model, in place, and return the processor that knows them, too.

    The ids of all other genes and tokens stay what they are. The vectors of the new genes start at the mean over the
    genes that the model knows: nothing else is known of them before training.

    Args:
        model: a model with heads, without a decoder of counts and without modalities, as `ScGPTForPerturbation` is.
        processor: its processor.
        names: names of the new genes.
        symbols: their symbols, equally long.

    Returns:
        The processor with the settings of the given one.

    Raises:
        ValueError: a name is known or occurs twice.

    Example:
        >>> processor = ScGPTProcessor.from_genes(["CD3D", "CD8A"])
        >>> config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id)
        >>> extended = add_genes(ScGPTForPerturbation(config), processor, ["KLF1"], ["KLF1"])
        >>> extended.genes
        ['CD3D', 'CD8A', 'KLF1']
    """
    vocabulary = processor.tokenizer.get_vocab()
    if repeated := sorted(name for name, n in Counter([*vocabulary, *names]).items() if n > 1):
        raise ValueError(f"expected new genes, found names that are in the vocabulary or occur twice: {repeated[:10]}")
    known = torch.tensor([vocabulary[gene] for gene in processor.genes])
    settings = {name: getattr(processor, name) for name in signature(ScGPTProcessor).parameters if name != "tokenizer"}
    settings["symbols"] = [*(processor.symbols or processor.genes), *symbols]
    new_ids = {name: len(vocabulary) + position for position, name in enumerate(names)}
    extended = ScGPTProcessor.from_vocab({**vocabulary, **new_ids}, **settings)
    encoder = model.scgpt
    tables = [encoder.gene_encoder.embedding, *([] if encoder.shortcut is None else [encoder.shortcut.genes])]
    for table in tables:
        rows = table.weight.detach()
        added = rows[known].mean(dim=0).expand(len(names), -1)
        table.weight = nn.Parameter(torch.cat([rows, added]))
        table.num_embeddings = extended.vocab_size
    model.config.vocab_size = extended.vocab_size
    return extended
