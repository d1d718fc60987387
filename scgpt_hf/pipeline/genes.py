"""Match the genes of a source to the vocabulary of a model: by id, else by name."""

import logging
from typing import NamedTuple

import numpy as np
import pandas as pd

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.genes import ENSEMBL, find_species
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

logger = logging.getLogger(__name__)


class GeneMatch(NamedTuple):
    """How the genes of a source relate to a vocabulary.

    Attributes:
        gene_ids: vocabulary id of each gene of the source, −1 where unknown; int64 (genes,), read-only.
        coverage: number of genes of the vocabulary matched `by_id` and `by_symbol`, of `duplicates`, of `unknown`
            genes, and of genes in the `vocabulary`. Duplicates are columns with the symbol of another column: their
            counts are added to it, or left out if the other one is matched by id.
    """

    gene_ids: Int64Array
    coverage: dict[str, int]


def match_source_genes(genes: pd.DataFrame, processor: ScGPTProcessor) -> GeneMatch:
    """Match each gene of a source to the vocabulary of a processor.

    A gene is looked up by its id, then by its name, which may be a gene id of the model or a symbol. Where several
    genes share a name, they have the same vocabulary id, so that the processor sums their counts. If a gene is matched
    by id, others that only share its name are left out: they have other ids.

    Args:
        genes: table with `feature_id` and `feature_name`, one row per column of the counts, as `CellSource.genes`.
        processor: holds the vocabulary.

    Raises:
        ValueError: too few genes are known; see `ScGPTProcessor.match_genes`. The message points out mouse
            genes, and names that differ in letter case.
    """
    vocabulary = processor.genes
    ids, symbols = genes["feature_id"].astype(str), genes["feature_name"].astype(str)
    by_id = ids.isin(vocabulary)
    others = symbols[~by_id]
    named = pd.Series(processor.resolve_symbols(others), others.index, dtype=object)
    named = named[named.isin(vocabulary)]
    others_of_known = named.isin(ids[by_id])
    repeated = others_of_known | named.duplicated()
    names = ids.copy()
    names.update(named[~others_of_known])
    try:
        gene_ids = processor.match_genes(list(names))
    except ValueError as error:
        species, model = find_species(ids, symbols), species_of_model(processor)
        if species not in (None, model) and (model is not None or species == "mouse"):
            raise ValueError(
                f"the data have {species} genes, e.g. {symbols[:3].tolist()} ({ids.iloc[0]}), which the model does not "
                f"know: its genes are such as {vocabulary[:3]}; use a model of {species} cells, or rename the genes to "
                "their orthologs in the model's species first"
            ) from error
        if example := _differing_only_in_case(pd.concat([ids, symbols]), processor):
            raise ValueError(
                f"{error}. The names differ from those of the vocabulary in letter case: {example[0]!r} is its "
                f"{example[1]!r}; write them alike, e.g. adata.var_names = adata.var_names.str.upper()"
            ) from error
        raise
    _require_one_species(ids, processor)
    n_known, n_repeated = len(np.unique(gene_ids[gene_ids >= 0])), int(repeated.sum())
    n_symbols = len(named) - n_repeated
    coverage = {
        "by_id": n_known - n_symbols,
        "by_symbol": n_symbols,
        "duplicates": n_repeated,
        "unknown": len(genes) - n_known - n_repeated,
        "vocabulary": len(vocabulary),
    }
    if n_symbols:
        logger.info("%d genes were found by symbol", n_symbols)
    # The processor validates a read-only array once, and a writable one again for each batch.
    gene_ids.flags.writeable = False
    return GeneMatch(gene_ids, coverage)


def species_of_model(processor: ScGPTProcessor) -> str | None:
    """Return the species of the vocabulary, as `find_species` does."""
    genes = pd.Series(processor.genes, dtype=object)
    return find_species(genes, pd.Series(processor.symbols, dtype=object) if processor.symbols else genes)


def _require_one_species(ids: pd.Series, processor: ScGPTProcessor) -> None:
    """Raise if the data have Ensembl ids of one species and the model knows their symbols from another.

    Mouse symbols that are written in capitals are those of human genes.
    """
    if not ids.str.match(ENSEMBL).mean() > 0.5:
        return
    species, model = find_species(ids, ids), species_of_model(processor)
    if None in (species, model) or species == model:
        return
    has_ids = pd.Series(processor.genes, dtype=object).str.match(ENSEMBL).mean() > 0.5
    if not has_ids and {species, model} != {"human", "mouse"}:
        return  # other species write symbols in capitals as well
    raise ValueError(
        f"the data have the Ensembl ids of {species} genes, e.g. {ids.iloc[0]}, and the model is one of {model} cells: "
        f"its genes are such as {processor.genes[:3]}. Only the symbols agree; use a model of {species} cells. If the "
        f"symbols are those of {model} orthologs, leave the {species} ids out of var"
    )


def _differing_only_in_case(names: pd.Series, processor: ScGPTProcessor) -> tuple[str, str] | None:
    """Return a name of the data and the same one in the vocabulary, if more than a tenth differ only in letter case."""
    in_vocabulary = {name.casefold(): name for name in (*processor.genes, *(processor.symbols or ()))}
    spelled = names.str.casefold().map(in_vocabulary)
    differing = spelled.notna() & (spelled != names)
    # Each gene is given twice, by its id and by its symbol: a tenth of the genes is a twentieth of the names.
    if names.empty or differing.mean() < 0.05:
        return None
    return str(names[differing].iloc[0]), str(spelled[differing].iloc[0])
