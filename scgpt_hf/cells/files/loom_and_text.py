"""Read `.loom` files with anndata and loompy, and tables of text with pandas. Both are read into memory."""

import logging
import warnings
from pathlib import Path

import anndata
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.cells.files.validation import translate_read_errors
from scgpt_hf.cells.genes import ENSEMBL

logger = logging.getLogger(__name__)

# Genes that most cells of human and mouse express. They show which axis of a table of symbols has the genes.
_COMMON_GENES = frozenset({"ACTB", "B2M", "EEF1A1", "GAPDH", "MALAT1", "RPL13", "RPLP0", "RPS27", "TMSB4X", "UBC"})
# What programs call the names of genes and of cells in `.loom` files, besides Gene and CellID, which anndata knows.
_INDEX_NAMES = ("var_names", "obs_names", "gene_names", "cell_names")


def read_loom(path: Path, name: str) -> AnnData:
    """Read a `.loom` file: its main matrix as `X`, and the others, such as those of velocyto, as layers.

    Args:
        path: the file, decompressed.
        name: its name in errors.

    Raises:
        ValueError: the file cannot be read, or loompy is not installed.
    """
    try:
        import loompy  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"cannot read {name!r}: .loom files need loompy, which is not installed: pip install 'scgpt_hf[loom]'"
        ) from error
    with translate_read_errors(name, "a .loom file"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Transforming to str index")  # where neither cells nor genes have names
        # Older files lack attributes that loompy would require.
        adata = anndata.io.read_loom(path, X_name="", validate=False)
    for table in (adata.obs, adata.var):
        if found := [column for column in _INDEX_NAMES if column in table]:
            table.index = pd.Index(table[found[0]].astype(str), name=None)
    return adata


def read_text_table(path: Path) -> AnnData:
    """Read a table of counts with the names of cells and genes in its first row and column, in either direction.

    Args:
        path: `.csv` (commas), `.tsv` or `.txt` (tabs), plain or compressed (`.gz`).

    Raises:
        ValueError: the file is not such a table, or none of its axes has names of genes.
    """
    separator = "," if path.name.lower().removesuffix(".gz").endswith(".csv") else "\t"
    with translate_read_errors(str(path), "a table of counts"):
        table = pd.read_csv(path, sep=separator, index_col=0)
    if wrong := [str(name) for name, dtype in table.dtypes.items() if dtype.kind not in "iuf"]:
        raise ValueError(f"{str(path)!r}: expected a table of counts, found other values in the columns {wrong[:5]}")
    n_genes = [_count_gene_names(names) for names in (table.index, table.columns)]
    if n_genes[0] == n_genes[1]:
        raise ValueError(
            f"{str(path)!r}: cannot decide whether the rows {table.index[:3].tolist()} … or the columns "
            f"{table.columns[:3].tolist()} … are genes; write the table as .h5ad, with the genes in var"
        )
    if n_genes[0] > n_genes[1]:
        table = table.T
    logger.info("%s: read %d cells and %d genes into memory", path, *table.shape)
    names = {"obs": pd.DataFrame(index=table.index.astype(str)), "var": pd.DataFrame(index=table.columns.astype(str))}
    return AnnData(csr_matrix(table.to_numpy()), **names)


def _count_gene_names(names: pd.Index) -> int:
    """Return how many names are certainly genes."""
    text = names.astype(str).to_series()
    return int((text.str.match(ENSEMBL) | text.str.upper().isin(_COMMON_GENES)).sum())
