"""Find cells whose label is probably a mistake: nearly all of the most similar cells have another label.

Doublets and cells of the wrong cluster put the boundary of a linear classifier in the wrong place, above all if their
label is rare. Arrays come in and go out; `annotate.py` leaves the cells out of the probe, and says so.
"""

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from scgpt_hf.cells.block import Int64Array

N_NEIGHBORS = 15  # Source: default of scanpy.pp.neighbors
# A label is contradicted if fewer than this share of the neighbors have it: none, one or two of 15. Our choice.
LOWEST_SHARE = 0.2
# If more labels than this share are contradicted, the types overlap, and the labels are no mistakes. Our choice: it
# is between .7 % (PBMC 4k and 8k, with doublets called megakaryocytes) and 9 % (ten types of T cells in lupus).
MOST_CONTRADICTED = 0.02
# A label keeps all of its cells if less than this share of them would be left. Our choice.
LOWEST_KEPT = 0.25
# Neighbors are searched among at most this number of cells, so that the time is proportional to the number of cells.
MAX_NEIGHBOR_CELLS = 20_000


def find_contradicted(
    embedding: npt.NDArray[np.floating], classes: Int64Array, *, seed: int = 0
) -> npt.NDArray[np.bool_]:
    """Find the cells whose label their neighbors contradict.

    Of the 15 nearest other cells, at most two have its label. Labels of 15 cells or fewer are never contradicted: most
    neighbors of their cells have another label even if all labels are right. Nor are labels of which less than a
    quarter would be left. If more than 2 % of all labels are contradicted, none is reported: the types overlap, and
    that is no mistake.

    Args:
        embedding: embedding of each cell; each feature is scaled to the same variance first. Shape (cells, hidden).
        classes: class id of each cell. Shape (cells,).
        seed: determines which cells are neighbors if there are more than 20,000.

    Returns:
        True for each cell whose label is contradicted. Shape (cells,).

    Example:
        >>> embedding = np.concatenate([np.zeros((40, 2)), np.ones((40, 2))])
        >>> classes = np.repeat([0, 1], 40)
        >>> classes[3] = 1
        >>> np.flatnonzero(find_contradicted(embedding, classes))
        array([3])

    Source: Wilson 1972, doi:10.1109/TSMC.1972.4309137 (edited nearest neighbors), who leaves out every cell that the
        majority of its neighbors outvotes. The two limits are ours, measured with `benchmarks/quality.py`.
    """
    n_cells, n_classes = len(classes), int(classes.max()) + 1
    among = np.sort(np.random.default_rng(seed).permutation(n_cells)[:MAX_NEIGHBOR_CELLS])
    if len(among) <= N_NEIGHBORS:
        return np.zeros(n_cells, dtype=bool)
    frequent = np.bincount(classes[among], minlength=n_classes) > N_NEIGHBORS
    contradicted = (_share_of_label(embedding, classes, among) < LOWEST_SHARE) & frequent[classes]
    n_contradicted, n_labelled = (np.bincount(one, minlength=n_classes) for one in (classes[contradicted], classes))
    contradicted &= (n_labelled - n_contradicted >= LOWEST_KEPT * n_labelled)[classes]
    return contradicted if contradicted.mean() <= MOST_CONTRADICTED else np.zeros(n_cells, dtype=bool)


def _share_of_label(
    embedding: npt.NDArray[np.floating], classes: Int64Array, among: Int64Array
) -> npt.NDArray[np.float64]:
    """Return the share of each cell's 15 nearest other cells that have its label, (cells,).

    Args:
        embedding: embedding of each cell. Shape (cells, hidden).
        classes: class id of each cell. Shape (cells,).
        among: positions of the cells that neighbors are searched among.
    """
    scale = embedding.std(axis=0)
    features = np.asarray(embedding / np.where(scale > 0, scale, 1.0), dtype=np.float32)
    index = NearestNeighbors(n_neighbors=N_NEIGHBORS + 1).fit(features[among])
    neighbors = among[index.kneighbors(features, return_distance=False)]
    is_self = neighbors == np.arange(len(classes))[:, None]
    is_self[~is_self.any(axis=1), -1] = True  # a cell that does not find itself drops the farthest one instead
    share: npt.NDArray[np.float64] = ((classes[neighbors] == classes[:, None]) & ~is_self).sum(axis=1) / N_NEIGHBORS
    return share
