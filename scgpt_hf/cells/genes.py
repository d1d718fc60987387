"""Find the gene ids of `var` tables, by Ensembl id where possible, and join the genes of several files.

The package `selection` decides which of these genes are used.
"""

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scgpt_hf.cells.missing import has_value

logger = logging.getLogger(__name__)

ENSEMBL = r"^ENS[A-Z]*G\d+"  # of any species, e.g. ENSG00000141510 and ENSMUSG00000059552
# Species → how its Ensembl gene ids start. Source: Ensembl, "Stable ID prefixes".
ENSEMBL_PREFIXES = {
    **{"human": "ENSG", "mouse": "ENSMUSG", "rat": "ENSRNOG", "zebrafish": "ENSDARG", "chicken": "ENSGALG"},
    **{"pig": "ENSSSCG", "cow": "ENSBTAG", "dog": "ENSCAFG", "rabbit": "ENSOCUG", "chimpanzee": "ENSPTRG"},
    **{"rhesus macaque": "ENSMMUG", "crab-eating macaque": "ENSMFAG", "marmoset": "ENSCJAG"},
}
MOUSE_SYMBOL = r"^[A-Z][a-z]"  # Cd3d; human symbols are in capitals, with few exceptions such as C1orf112
HUMAN_SYMBOL = r"^[A-Z][A-Z0-9.-]*$"
# Columns of var that hold ids or names: in the CELLxGENE schema, as scanpy writes them, and other common spellings;
# Accession is that of velocyto, ensembl_ids that of the Human Cell Atlas
ID_COLUMNS = ("feature_id", "gene_ids", "ensembl_id", "gene_id", "Accession", "ensembl_ids")
NAME_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")


def find_gene_ids(var: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the ids, names and lengths of the genes of a `var` table.

    The ids are the index if more than half of it are Ensembl ids. Otherwise they are the first such column among
    `ID_COLUMNS`, or, if there is none, the index. Version suffixes (`ENSG00000141510.18`) are removed and counted in
    the log. An id may occur several times: sources sum the counts of these columns.

    Args:
        var: one row for each gene.
        where: the name of the file, for the log and for errors.

    Returns:
        Columns `feature_id`, `feature_name` (the id where a name is missing) and `feature_length` (0 if unknown).
        Shape (genes, 3).

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
    repeated = stripped[stripped.duplicated()]
    if len(repeated):
        logger.warning(
            "%s: %d columns have the gene id of an earlier column, e.g. %s; their counts are summed",
            *(where, len(repeated), list(repeated.unique()[:5])),
        )
    names = next((_filled(var[name], index) for name in NAME_COLUMNS if name in var), index)
    lengths = _lengths(var["feature_length"], where) if "feature_length" in var else 0
    return pd.DataFrame({"feature_id": stripped, "feature_name": names, "feature_length": lengths})


def find_species(ids: pd.Series, symbols: pd.Series) -> str | None:
    """Return the species of most genes, by their Ensembl ids, else by the spelling of their symbols, or None.

    Spelling distinguishes symbols of mouse (Cd3d) and human (CD3D) only.

    Args:
        ids: gene ids. Shape (genes,).
        symbols: gene names. Shape (genes,).

    Example:
        >>> find_species(pd.Series(["ENSMUSG00000032094"]), pd.Series(["Cd3d"]))
        'mouse'
    """
    prefixes = ids.str.extract(r"^(ENS[A-Z]*G)\d", expand=False)
    for species, prefix in ENSEMBL_PREFIXES.items():
        if (prefixes == prefix).mean() > 0.5:
            return species
    if prefixes.notna().mean() > 0.5 or symbols.str.match(ENSEMBL).mean() > 0.5:
        return None
    spelling = {"mouse": MOUSE_SYMBOL, "human": HUMAN_SYMBOL}
    return next((name for name, pattern in spelling.items() if symbols.str.match(pattern).mean() > 0.5), None)


def join_genes(tables: Sequence[pd.DataFrame]) -> tuple[pd.DataFrame, list[NDArray[np.int32]]]:
    """Return the union of the genes of several files, and where the genes of each file are in it.

    Args:
        tables: the genes of each file, as `find_gene_ids` returns them.

    Returns:
        The genes in the order in which they first occur, shape (all genes, 3); and for each table the position of each
        of its rows among them, shape (genes of the table,). Rows of one id have the same position.
    """
    # One table after the other: thousands of files, most with the same genes, would take gigabytes together.
    new, place = [], pd.Index(tables[0]["feature_id"][:0])
    for table in tables:
        unseen = table[place.get_indexer(table["feature_id"]) < 0].drop_duplicates("feature_id")
        if len(unseen):
            new.append(unseen)
            place = pd.Index(np.concatenate([place, unseen["feature_id"]]))
    union = pd.concat(new or tables[:1], ignore_index=True)
    return union, [place.get_indexer(table["feature_id"]).astype(np.int32) for table in tables]


def _filled(column: pd.Series, index: pd.Series) -> pd.Series:
    """Return a column of var as strings, filled from the index where values are missing."""
    values = column.astype(object).reset_index(drop=True)
    return values.where(has_value(values), index).astype(str)


def _lengths(column: pd.Series, where: str) -> NDArray[np.int64]:
    """Return the lengths of genes, 0 where one is missing or is no positive number, as in a Census."""
    lengths = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(np.float64)
    missing = ~(np.isfinite(lengths) & (lengths > 0))
    if n_missing := int(missing.sum()):
        logger.info("%s: %d of %d genes have no feature_length; it is set to 0", where, n_missing, len(lengths))
    return np.where(missing, 0, lengths).astype(np.int64)
