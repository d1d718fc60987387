"""Which gene of the model each column of the data is: by its id, else by its name."""

import pandas as pd

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


def match_columns(genes: pd.DataFrame, processor: ScGPTProcessor) -> tuple[Int64Array, dict[str, int]]:
    """Return the vocabulary id of each gene of a source, or -1, and how the genes were found.

    A gene is looked up by its id, then by its name. Of genes that share a name, the first one stands for it, unless
    another is found by its id.

    Returns:
        int64 (genes,), and the numbers of genes matched `by_id` and `by_symbol`, of `duplicates` left out, of
        `unknown` genes, and of genes in the `vocabulary`.

    Raises:
        ValueError: too few genes are known; see `ScGPTProcessor.match_genes`.
    """
    vocabulary = processor.genes
    ids, symbols = genes["feature_id"].astype(str), genes["feature_name"].astype(str)
    by_id = ids.isin(vocabulary)
    named = ~by_id & symbols.isin(vocabulary)
    repeated = named & (symbols.isin(ids[by_id]) | symbols.where(named).duplicated())
    by_symbol = named & ~repeated
    gene_ids = processor.match_genes(list(ids.where(~by_symbol, symbols)))
    n_known, n_symbols, n_repeated = int((gene_ids >= 0).sum()), int(by_symbol.sum()), int(repeated.sum())
    return gene_ids, {
        "by_id": n_known - n_symbols,
        "by_symbol": n_symbols,
        "duplicates": n_repeated,
        "unknown": len(genes) - n_known - n_repeated,
        "vocabulary": len(vocabulary),
    }
