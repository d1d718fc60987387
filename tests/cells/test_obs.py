"""`take_cells` returns the rows of some cells in the order of their ids, as `loc` does."""

import numpy as np
import pandas as pd
import pytest

from scgpt_hf.cells.obs import take_cells

OBS = pd.DataFrame({"donor": ["a", "b", "c", "d"]}, index=[2, 5, 7, 9])


@pytest.mark.parametrize("ids", [[2, 5, 7, 9], [9, 2], [], [5]])
def test_cells_are_taken_in_the_order_of_their_ids(ids):
    pd.testing.assert_frame_equal(take_cells(OBS, np.array(ids, np.int64)), OBS.loc[ids])
    pd.testing.assert_series_equal(take_cells(OBS["donor"], np.array(ids, np.int64)), OBS["donor"].loc[ids])


@pytest.mark.parametrize("ids", [[3], [2, 10], [1, 2, 5, 7]])
def test_a_cell_that_obs_lacks_raises(ids):
    with pytest.raises(KeyError, match="are not in obs"):
        take_cells(OBS, np.array(ids))
    with pytest.raises(KeyError, match="1 of 1 cells"):
        take_cells(OBS.iloc[:0], np.array([2]))
