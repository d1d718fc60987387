"""Write elements of an AnnData to an open HDF5 file by their path, such as `obsm/X_scgpt`."""

from typing import Any

import h5py
from anndata.io import write_elem


def write_element(file: h5py.Group, path: str, value: Any, **options: Any) -> None:
    """Write an element; one of the same path is replaced. anndata from 0.13 on takes names, but no paths.

    Args:
        file: the file, or a group of it.
        path: where to write, e.g. `raw/var`; the group must exist, except that of the file itself.
        value: anything that anndata can write.
        **options: further arguments of `anndata.io.write_elem`.

    Raises:
        KeyError: the group does not exist.
    """
    group, _, name = path.rpartition("/")
    write_elem(file[group] if group else file, name, value, **options)
