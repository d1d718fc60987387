"""Find the gene ids of `var` tables, by Ensembl id where possible, and join the genes of several files.

The package `selection` decides which of these genes are used.
"""

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

ENSEMBL = r"^ENS[A-Z]*G\d+"  # of any species, e.g. ENSG00000141510 and ENSMUSG00000059552
# Columns of var that hold ids or names: in the CELLxGENE schema, as scanpy writes them, and other common spellings
ID_COLUMNS = ("feature_id", "gene_ids", "ensembl_id", "gene_id")
NAME_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")


def find_gene_ids(var: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the ids, names and lengths of the genes of a `var` table.

    The ids are the index if more than half of it are Ensembl ids. Otherwise they are the first such column among
    `ID_COLUMNS`, or, if there is none, the index. Version suffixes (`ENSG00000141510.18`) are removed and counted in
    the log.

    Args:
        var: one row for each gene.
        where: the name of the file, for the log and for errors.

    Returns:
        Columns `feature_id`, `feature_name` (the id where a name is missing) and `feature_length` (0 if unknown).
        Shape (genes, 3).

    Raises:
        ValueError: a gene id occurs more than once.

    Example:
        >>> find_gene_ids(pd.DataFrame({"gene_ids": ["ENSG00000141510.18"]}, index=["TP53"]), "example")
                feature_id feature_name  feature_length
        0  ENSG00000141510         TP53               0
    """
    index = pd.Series(var.index.astype(str), dtype=object)
    candidates = [index, *(_filled(var[name], index) for name in ID_COLUMNS if name in var)]
    ensembl = [ids for ids in candidates if ids.str.match(ENSEMBL).mean() > 0.5]
    ids = ensembl[0] if ensembl else index
    if not ensembl and len(ids):
        logger.info("%s: found no Ensembl ids; using the index of var as gene ids, e.g. %s", where, ids.iloc[0])
    stripped = ids.str.replace(rf"({ENSEMBL})\.\d+$", r"\1", regex=True)
    if n_stripped := int((stripped != ids).sum()):
        logger.info("%s: removed the version from %d Ensembl ids", where, n_stripped)
    repeated = stripped[stripped.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"expected each gene id once, found {len(repeated):,} repeated ids in {where}, e.g. {list(repeated[:5])}; "
            "sum the counts of these genes, or rename all but one of each (adata.var_names_make_unique())"
        )
    names = next((_filled(var[name], index) for name in NAME_COLUMNS if name in var), index)
    lengths = var["feature_length"].to_numpy(np.int64) if "feature_length" in var else 0
    return pd.DataFrame({"feature_id": stripped, "feature_name": names, "feature_length": lengths})


def join_genes(tables: Sequence[pd.DataFrame]) -> tuple[pd.DataFrame, list[NDArray[np.int32]]]:
    """Return the union of the genes of several files, and where the genes of each file are in it.

    Args:
        tables: the genes of each file, as `find_gene_ids` returns them.

    Returns:
        The genes in the order in which they first occur, shape (all genes, 3); and for each table the position of each
        of its genes among them, shape (genes of the table,).
    """
    union = pd.concat(tables).drop_duplicates("feature_id", ignore_index=True)
    place = pd.Index(union["feature_id"])
    return union, [place.get_indexer(table["feature_id"]).astype(np.int32) for table in tables]


def _filled(column: pd.Series, index: pd.Series) -> pd.Series:
    """Return a column of var as strings, filled from the index where values are missing."""
    values = column.astype(object).reset_index(drop=True)
    return values.where(values.notna(), index).astype(str)
