"""Fit a PCA on some cells and apply it to others: the simplest embedding that knows the training cells.

A pretrained model should beat it on cells that neither has seen. The recipe is scanpy's: counts per 10,000, log1p,
variable genes, 50 components.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from scgpt_hf.cells.atomic import replace_file
from scgpt_hf.scoring.metrics import Labels
from scgpt_hf.scoring.normalization import log_normalize, variable_genes

Float32Array = npt.NDArray[np.float32]

PCA_FILE = "baselines/pca.safetensors"  # in a run folder
N_COMPONENTS = 50  # Source: default of scanpy.pp.pca
_GENES = "genes"  # key of the metadata of a file


@dataclass(frozen=True, eq=False)
class FittedPCA:
    """A PCA of log-normalized counts.

    Attributes:
        genes: ids of the genes that it reads.
        mean: mean log-normalized count of each gene in the cells that it was fitted to, float32 (genes,).
        components: principal axes, float32 (components, genes).
    """

    genes: Sequence[str]
    mean: Float32Array
    components: Float32Array

    def transform(self, counts: csr_matrix, genes: Sequence[str]) -> Float32Array:
        """Project cells onto the components.

        A gene that the cells lack takes its mean, so it does not move the cells.

        Args:
            counts: raw counts. Shape (cells, genes).
            genes: id of each column. Shape (genes,).

        Returns:
            float32 components, shape (cells, components).

        Raises:
            ValueError: no gene is known, or an id occurs twice.
        """
        columns = find_genes(genes, self.genes)
        measured = columns >= 0
        values = log_normalize(counts)[:, columns[measured]].toarray() - self.mean[measured]
        projected: Float32Array = values @ self.components[:, measured].T
        return projected

    def save(self, path: Path) -> None:
        """Write the PCA to a safetensors file, atomically."""
        save_arrays(path, {"mean": self.mean, "components": self.components}, self.genes)

    @classmethod
    def load(cls, path: Path) -> "FittedPCA":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: see `load_arrays`.
        """
        arrays, genes = load_arrays(path, ("mean", "components"))
        return cls(genes, arrays["mean"], arrays["components"])


def fit_pca(
    counts: csr_matrix, genes: Sequence[str], batches: Labels, seed: int = 0, *, selected: Sequence[str] | None = None
) -> FittedPCA:
    """Fit 50 principal components to the log-normalized counts of variable genes.

    Args:
        counts: raw counts. Shape (cells, genes).
        genes: id of each column. Shape (genes,).
        batches: batch of each cell; variable genes are ranked within each. Shape (cells,).
        seed: seed of the solver's start vector.
        selected: genes to use instead of variable genes.

    Raises:
        ValueError: there are fewer than two cells or two genes, no gene is expressed, or an id occurs twice.

    Example:
        >>> pca = fit_pca(counts, genes, donors)  # doctest: +SKIP
        >>> pca.transform(other_counts, other_genes).shape  # doctest: +SKIP
        (3000, 50)

    Source: scanpy.pp.pca with its defaults.
    """
    chosen, normalized = choose_genes(counts, genes, batches, selected)
    fitted = fit_components(normalized.toarray(), seed)
    return FittedPCA(chosen, fitted.mean_.astype(np.float32), fitted.components_.astype(np.float32))


def fit_components(features: npt.NDArray[Any], seed: int) -> Any:
    """Fit 50 principal components of centered, unscaled features and return scikit-learn's `PCA`.

    Args:
        features: shape (cells, features). There are fewer components if there are at most 50 cells or features.
        seed: seed of the solver's start vector.

    Raises:
        ValueError: there are fewer than two cells or two features.
    """
    from sklearn.decomposition import PCA

    n_components = min(N_COMPONENTS, min(features.shape) - 1)
    if n_components < 1:
        raise ValueError(f"PCA needs at least two cells and two genes, found shape {features.shape}")
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(features)


def choose_genes(
    counts: csr_matrix, genes: Sequence[str], batches: Labels, selected: Sequence[str] | None
) -> tuple[list[str], csr_matrix]:
    """Return the selected or the variable genes, and their log-normalized counts, float32 (cells, chosen genes).

    Args:
        counts: raw counts. Shape (cells, genes).
        genes: id of each column. Shape (genes,).
        batches: batch of each cell. Shape (cells,).
        selected: genes to choose; by default variable ones. Those that are no column are left out.

    Raises:
        ValueError: no gene is selected or expressed, or an id occurs twice.
    """
    normalized = log_normalize(counts)
    if selected is None:
        columns = variable_genes(normalized, batches)
    else:
        columns = find_genes(genes, selected)
        columns = columns[columns >= 0]
    return np.asarray(genes, dtype=str)[columns].tolist(), normalized[:, columns]


def find_genes(genes: Sequence[str], wanted: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the column of each wanted gene, −1 where there is none. Shape (wanted genes,).

    Raises:
        ValueError: an id occurs twice, or no gene is found.
    """
    index = pd.Index(np.asarray(genes, dtype=str))
    if not index.is_unique:
        raise ValueError(f"expected each gene once, found {index[index.duplicated()][0]!r} twice; sum their counts")
    columns = index.get_indexer(pd.Index(np.asarray(wanted, dtype=str)))
    if not (columns >= 0).any():
        raise ValueError(
            f"none of the {len(wanted):,} genes is in the data: expected such as {list(wanted)[:3]}, found "
            f"{index[:3].tolist()}; use the same gene ids in both"
        )
    return np.asarray(columns, dtype=np.int64)


def save_arrays(path: Path, arrays: dict[str, npt.NDArray[Any]], genes: Sequence[str]) -> None:
    """Write arrays and gene ids to a safetensors file, atomically. The folder is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replace_file(path) as temporary:
        save_file(contiguous, temporary, metadata={_GENES: json.dumps(list(genes))})


def load_arrays(path: Path, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return arrays and gene ids of a file that `save_arrays` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or lacks an array. The message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; a pretraining run writes it at its end, unless it is turned off")
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()[_GENES])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or holds something else: {error}; fit it again") from error
