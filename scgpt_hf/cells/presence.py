"""Which genes each data set measured.

A gene that a data set did not measure has no counts in its cells, like a gene that none of them expresses. Only the
data set itself can tell the two apart: by its list of genes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scgpt_hf.cells.block import Int64Array


class Presence(NamedTuple):
    """The data set of each of some cells, and the genes that each data set measured.

    Attributes:
        dataset_of_cell: row of `measured` for each cell. Shape (cells,).
        measured: whether the data set measured the gene; false throughout if that is unknown. Shape (datasets, genes).

    Example:
        >>> presence = Presence(np.array([0, 0, 1]), np.array([[True, False], [True, True]]))
        >>> presence.of_groups(np.array([0, 1, 1]), 2)
        array([[ True, False],
               [ True,  True]])
    """

    dataset_of_cell: Int64Array
    measured: NDArray[np.bool_]

    def of_groups(self, group_of_cell: Int64Array, n_groups: int) -> NDArray[np.bool_]:
        """Return the genes that at least one data set of each group of cells measured.

        Args:
            group_of_cell: number of each cell's group, from 0. Shape (cells,).
            n_groups: number of groups; one without cells has no genes.

        Returns:
            Shape (groups, genes).
        """
        found = np.zeros((n_groups, self.measured.shape[1]), np.bool_)
        # counted, not sorted: there may be 100 million cells
        pairs = np.bincount(group_of_cell * len(self.measured) + self.dataset_of_cell)
        for pair in np.flatnonzero(pairs):
            group, dataset = divmod(pair, len(self.measured))
            found[group] |= self.measured[dataset]
        return found
