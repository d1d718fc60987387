"""Which gene a column of counts is: by Ensembl id where there is one, joined over many files.

Decides where `var` keeps its ids and names. Which genes are used is decided by `select.py`.
"""

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

ENSEMBL = r"^ENS[A-Z]*G\d+"
ID_COLUMNS = ("feature_id", "gene_ids", "ensembl_id", "gene_id")
NAME_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")


def find_gene_ids(var: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the genes of a `var` table as `feature_id`, `feature_name` and `feature_length`.

    Ids are the index if most of it looks like Ensembl, else the first such column of `feature_id`, `gene_ids`,
    `ensembl_id` and `gene_id`, else the index as it is. Version suffixes (`ENSG00000141510.18`) are taken off and
    counted in the log. `feature_length` is 0 where var does not tell.

    Raises:
        ValueError: a gene id occurs twice.
    """
    index = pd.Series(var.index.astype(str), dtype=object)
    candidates = [index, *(_filled(var[name], index) for name in ID_COLUMNS if name in var)]
    ensembl = [ids for ids in candidates if ids.str.match(ENSEMBL).mean() > 0.5]
    ids = ensembl[0] if ensembl else index
    if not ensembl and len(ids):
        logger.info("%s: no Ensembl ids found; genes go by the index, e.g. %s", where, ids.iloc[0])
    stripped = ids.str.replace(rf"({ENSEMBL})\.\d+$", r"\1", regex=True)
    if n_stripped := int((stripped != ids).sum()):
        logger.info("%s: took the version off %d Ensembl ids", where, n_stripped)
    repeated = stripped[stripped.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"expected each gene id once, found {len(repeated):,} repeated in {where}, e.g. {list(repeated[:5])}; "
            "sum these genes, or rename all but one of each (adata.var_names_make_unique())"
        )
    names = next((_filled(var[name], index) for name in NAME_COLUMNS if name in var), index)
    lengths = var["feature_length"].to_numpy(np.int64) if "feature_length" in var else 0
    return pd.DataFrame({"feature_id": stripped, "feature_name": names, "feature_length": lengths})


def join_genes(tables: Sequence[pd.DataFrame]) -> tuple[pd.DataFrame, list[NDArray[np.int32]]]:
    """Return the union of the genes in first-seen order, and for each table the place of each of its genes there."""
    union = pd.concat(tables).drop_duplicates("feature_id", ignore_index=True)
    place = pd.Index(union["feature_id"])
    return union, [place.get_indexer(table["feature_id"]).astype(np.int32) for table in tables]


def _filled(column: pd.Series, index: pd.Series) -> pd.Series:
    """Return a column of var as strings, with the index where it is missing."""
    values = column.astype(object).reset_index(drop=True)
    return values.where(values.notna(), index).astype(str)
