"""Several modalities in one table of counts: genes, and proteins or peaks that were measured in the same cells.

`join_modalities` makes one AnnData of them. The id of a feature that is no gene starts with its modality, such as
`protein:CD4`, so every source, Census and cache can hold it, and it never collides with the gene of the same name.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack, issparse

from scgpt_hf.cells.genes import find_gene_ids

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

RNA = "RNA"
MODALITIES = ("protein", "peak")  # besides RNA; the prefixes of their ids
PROTEIN_KEY = "protein_counts"
# Names of the parts of a MuData, and values of var["feature_types"] as Cell Ranger writes them.
_RNA_NAMES = ("rna", "gex", "Gene Expression")
_OTHER_NAMES = {
    "protein": ("prot", "protein", "adt", "cite", "Antibody Capture"),
    "peak": ("atac", "peaks", "Peaks"),
}


def join_modalities(
    rna: Any, other: "AnnData | None" = None, *, modality: str = "protein", obsm_key: str = PROTEIN_KEY
) -> "AnnData":
    """Join the genes and another modality of the same cells to one AnnData.

    The other modality is looked for in this order: `other`; the part of a `MuData` named prot, protein, adt, atac, …;
    rows of `var` whose `feature_types` are "Antibody Capture" or "Peaks", as `scanpy.read_10x_h5(gex_only=False)`
    returns them; `rna.obsm[obsm_key]`, a DataFrame, or an array with names in `rna.uns["protein_names"]`.

    Args:
        rna: an AnnData or a MuData with raw counts in `X`.
        other: raw counts of the other modality, with its names in `var_names`; the same cells in any order.
        modality: which other modality: "protein" or "peak".
        obsm_key: key of the counts in `obsm`.

    Returns:
        A new AnnData with the cells and obs of the RNA. `X` is sparse, float32: genes first, then the other modality.
        `var` has `feature_id`, as its index, `feature_name` and `modality`. Ids of the other modality are
        `protein:NAME`. Shape (cells, genes + proteins).

    Raises:
        ValueError: the other modality is not found, has no or repeated names, other cells, or values that are no raw
            counts.

    Example:
        >>> adata.obsm["protein_counts"] = pd.DataFrame({"CD3": 5, "CD19": 1}, index=adata.obs_names)
        >>> joined = join_modalities(adata)
        >>> joined.var_names[-2:].tolist()
        ['protein:CD3', 'protein:CD19']
        >>> joined.write_h5ad("joined.h5ad")  # scgpt-hf pretrain --data joined.h5ad
    """
    from anndata import AnnData

    if modality not in MODALITIES:
        raise ValueError(f"modality is {modality!r}; expected one of {', '.join(MODALITIES)}")
    genes, counts, names = _find_parts(rna, other, modality, obsm_key)
    if len(names) != counts.shape[1] or not names:
        raise ValueError(f"found {len(names)} names for {counts.shape[1]} columns of the modality {modality!r}")
    if repeated := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ValueError(f"{modality} names occur more than once: {repeated[:5]}; make them unique")
    ids = find_gene_ids(genes.var, "the RNA")[["feature_id", "feature_name"]].assign(modality=RNA)
    labels = [name.removeprefix(f"{modality}:") for name in names]
    added = pd.DataFrame(
        {
            "feature_id": [f"{modality}:{name}" for name in labels],
            "feature_name": [f"{name} ({modality})" for name in labels],
            "modality": modality,
        }
    )
    var = pd.concat([ids, added], ignore_index=True)
    var.index = pd.Index(var["feature_id"].to_numpy(), name=None)
    matrix = csr_matrix(hstack([csr_matrix(genes.X), counts], format="csr"), dtype=np.float32)
    logger.info("joined %d genes and %d features of the modality %s", len(ids), len(added), modality)
    return AnnData(matrix, obs=genes.obs.copy(), var=var)


def modalities_of(feature_ids: Sequence[str]) -> list[str]:
    """Return the modality of each feature: the prefix of its id, `protein` or `peak`, or RNA.

    Example:
        >>> modalities_of(["ENSG00000010610", "protein:CD4"])
        ['RNA', 'protein']
    """
    prefixes = tuple(f"{modality}:" for modality in MODALITIES)
    return [name.partition(":")[0] if name.startswith(prefixes) else RNA for name in map(str, feature_ids)]


def _find_parts(
    rna: Any, other: "AnnData | None", modality: str, obsm_key: str
) -> tuple["AnnData", csr_matrix, list[str]]:
    """Return the AnnData of the genes, and counts and names of the other modality for the same cells."""
    if other is not None:
        return rna, _raw_counts(_align(other, rna.obs_names, modality).X, modality), _names(other.var_names)
    if hasattr(rna, "mod"):  # a MuData, which need not be installed
        return _split_mudata(rna, modality)
    if "feature_types" in rna.var and rna.var["feature_types"].isin(_OTHER_NAMES[modality]).any():
        kinds = rna.var["feature_types"].astype(str)
        part = rna[:, kinds.isin(_OTHER_NAMES[modality]).to_numpy()]
        genes = rna[:, kinds.isin(_RNA_NAMES).to_numpy()]
        return genes.copy(), _raw_counts(part.X, modality), _names(part.var_names)
    if obsm_key not in rna.obsm:
        raise ValueError(
            f"found no {modality} counts: obsm has {sorted(rna.obsm)} and no {obsm_key!r}; pass obsm_key=..., or the "
            "counts as a second AnnData"
        )
    found = rna.obsm[obsm_key]
    if isinstance(found, pd.DataFrame):
        return rna, _raw_counts(found.to_numpy(), modality), _names(found.columns)
    if "protein_names" not in rna.uns:
        raise ValueError(
            f"obsm[{obsm_key!r}] has no names; put them into uns['protein_names'], or make it a DataFrame with the "
            "names as columns"
        )
    return rna, _raw_counts(found, modality), _names(rna.uns["protein_names"])


def _split_mudata(data: Any, modality: str) -> tuple["AnnData", csr_matrix, list[str]]:
    """Return genes, counts and names of a MuData, for the cells that both parts have."""
    rna = next((data.mod[name] for name in _RNA_NAMES if name in data.mod), None)
    other = next((data.mod[name] for name in _OTHER_NAMES[modality] if name in data.mod), None)
    if rna is None or other is None:
        raise ValueError(
            f"the MuData has the parts {sorted(data.mod)}; expected one of {_RNA_NAMES[:2]} and one of "
            f"{_OTHER_NAMES[modality][:-1]}"
        )
    shared = rna.obs_names.intersection(other.obs_names)
    rna = rna[shared].copy()
    return rna, _raw_counts(_align(other, rna.obs_names, modality).X, modality), _names(other.var_names)


def _align(other: "AnnData", cells: pd.Index, modality: str) -> "AnnData":
    """Return the other modality in the order of the cells of the RNA."""
    for index, name in ((cells, "RNA"), (other.obs_names, modality)):
        if not index.is_unique:
            raise ValueError(f"obs_names of the {name} are not unique; call adata.obs_names_make_unique() before")
    if absent := cells.difference(other.obs_names).tolist():
        raise ValueError(
            f"{len(absent):,} of {len(cells):,} cells have no {modality} counts, e.g. {absent[:3]}; name the cells of "
            "both alike, or leave these out"
        )
    return other[cells]


def _names(names: Any) -> list[str]:
    return [str(name) for name in np.asarray(names).ravel()]


def _raw_counts(values: Any, modality: str) -> csr_matrix:
    """Return counts as CSR, float32. Raise ValueError unless they are whole numbers >= 0."""
    matrix = csr_matrix(values if issparse(values) else np.asarray(values, dtype=np.float64))
    data = matrix.data
    wrong = data[~((data >= 0) & (data == np.floor(data)) & np.isfinite(data))]
    if len(wrong):
        raise ValueError(
            f"expected raw {modality} counts, found {wrong[0]:g} and {len(wrong) - 1:,} more values that are no whole "
            "number >= 0; pass counts before normalization (CLR, DSB)"
        )
    return csr_matrix(matrix, dtype=np.float32)
