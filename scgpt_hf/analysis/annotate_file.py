"""Annotate the cells of an .h5ad file without reading its counts into memory: write a copy with new columns in obs.

`annotate.py` decides which type a cell has.
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from anndata import AnnData

from scgpt_hf.cells.files.additions import open_copy, write_columns, write_plainly
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cells.files.elements import write_element
from scgpt_hf.output import require_writable_file, write_beside


def annotate_file(
    path: str | Path, out: str | Path, annotate: Callable[[AnnData], dict[str, Any]], *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a copy of an .h5ad file with everything that a function adds to obs, obsm and uns.

    The file is copied first, so an error of writing comes before the computation. Only what is added or changed is
    written. The copy is renamed to `out` once it is complete; a failure of `annotate` leaves nothing behind.

    Args:
        path: the file.
        out: the copy; may be `path` itself.
        annotate: is called with the cells, whose counts stay on disk, e.g. `predict_cell_types` with its arguments.
        overwrite: replace `out`.

    Returns:
        What `annotate` returns.

    Raises:
        FileExistsError: `out` exists and `overwrite` is false.
        OSError: `out` cannot be written. If the cells were annotated already, the message says where the results are.
        ValueError: the file cannot be read as h5ad; or what `annotate` raises.

    Example:
        >>> annotate = functools.partial(predict_cell_types, model="runs/types/best_model")
        >>> annotate_file("query.h5ad", "annotated.h5ad", annotate)["unassigned"]
        12
    """
    require_writable_file(out, overwrite=overwrite)
    adata = open_anndata(path)
    with closing(adata.file), open_copy(path, out, overwrite=overwrite) as copy:
        obs = adata.obs.copy()
        before = {group: dict(getattr(adata, group)) for group in ("obsm", "uns")}
        report = annotate(adata)
        changed = {
            f"{group}/{key}": value
            for group, old in before.items()
            for key, value in getattr(adata, group).items()
            if value is not old.get(key)
        }
        columns = adata.obs[[name for name in adata.obs if name not in obs or not adata.obs[name].equals(obs[name])]]
        try:
            write_columns(copy, columns)
            for name, value in changed.items():
                write_element(copy, name, value)
            copy.flush()
        except Exception as error:
            raise write_beside(out, partial(write_plainly, additions={"obs": columns, **changed}), error) from error
    return report
