"""Which gene of the model each column of the data is: by its id, else by its name."""

import logging

import pandas as pd

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

logger = logging.getLogger(__name__)

MOUSE_ID = r"^ENSMUSG\d"
MOUSE_SYMBOL = r"^[A-Z][a-z]"  # Cd3d; human symbols are written in capitals, but for the likes of C1orf112


def match_columns(genes: pd.DataFrame, processor: ScGPTProcessor) -> tuple[Int64Array, dict[str, int]]:
    """Return the vocabulary id of each gene of a source, or -1, and how the genes were found.

    A gene is looked up by its id, then by its name, which may be the model's id of a gene or its symbol. Of genes that
    share a name, the first one stands for it, unless another is found by its id.

    Returns:
        int64 (genes,), read-only, and the numbers of genes matched `by_id` and `by_symbol`, of `duplicates` left out,
        of `unknown` genes, and of genes in the `vocabulary`.

    Raises:
        ValueError: too few genes are known; see `ScGPTProcessor.match_genes`. The message says if they are a mouse's.
    """
    vocabulary = processor.genes
    ids, symbols = genes["feature_id"].astype(str), genes["feature_name"].astype(str)
    by_id = ids.isin(vocabulary)
    others = symbols[~by_id]
    named = pd.Series(processor.resolve_symbols(others), others.index, dtype=object)
    named = named[named.isin(vocabulary)]
    repeated = named.isin(ids[by_id]) | named.duplicated()
    names = ids.copy()
    names.update(named[~repeated])
    try:
        gene_ids = processor.match_genes(list(names))
    except ValueError as error:
        if _of_a_mouse(ids, symbols):
            raise ValueError(
                f"the data have mouse genes, e.g. {symbols[:3].tolist()} ({ids.iloc[0]}), which the model does not "
                f"know: its genes are such as {vocabulary[:3]}; use a model of mouse cells, or rename the genes to "
                "their human orthologs first"
            ) from error
        raise
    n_known, n_repeated = int((gene_ids >= 0).sum()), int(repeated.sum())
    n_symbols = len(named) - n_repeated
    coverage = {
        "by_id": n_known - n_symbols,
        "by_symbol": n_symbols,
        "duplicates": n_repeated,
        "unknown": len(genes) - n_known - n_repeated,
        "vocabulary": len(vocabulary),
    }
    logger.info("genes: %s", coverage)
    gene_ids.flags.writeable = False  # the processor then checks them once, and not for every batch
    return gene_ids, coverage


def _of_a_mouse(ids: pd.Series, symbols: pd.Series) -> bool:
    """Return whether most ids are Ensembl's of the mouse, or most symbols are written as a mouse's (Cd3d, not CD3D)."""
    return bool(ids.str.match(MOUSE_ID).mean() > 0.5 or symbols.str.match(MOUSE_SYMBOL).mean() > 0.5)
