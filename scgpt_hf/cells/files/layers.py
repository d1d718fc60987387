"""Find the layer of a file that holds raw counts.

The counts are often not in `X`: the tutorials of scanpy and scvi-tools keep them in `.raw` or in `layers["counts"]`
and normalize `X`. `contents.py` opens the file.
"""

import logging

import numpy as np
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import find_invalid_counts, name_layers, require_counts
from scgpt_hf.cells.files.contents import RAW, Contents
from scgpt_hf.cells.files.matrices import read_rows

logger = logging.getLogger(__name__)

CELLS_CHECKED = 1000  # first cells of a layer, by which it is checked for raw counts when a file is opened
# Names by which layers say that they hold counts, in lower case, without "_", "-", " " and "."
COUNT_NAMES = {"raw", "counts", "count", "rawcounts", "rawcount", "countsraw", "umi", "umis", "umicounts", "rawumi"}
LOGARITHMS = 14.0  # log1p of a million: normalized and logarithmized values are smaller, the highest counts larger
EQUAL_SUMS = 1e-3  # relative difference of the sums of cells that were normalized to the same sum


def choose_layer(contents: Contents, layer: str | None, *, round_counts: bool) -> str:
    """Return the name of the layer with the raw counts, after checking its first cells.

    Without a requested layer this is `X`, if it holds raw counts. If not, it is the only other layer that does and that
    is named for it: `.raw`, "counts", "raw_counts" and the like.

    Args:
        contents: the file.
        layer: the requested layer, or None; "raw" means `.raw` if there is no layer of that name.
        round_counts: accept fractional counts, if no layer has integers.

    Raises:
        ValueError: there is no such layer, or it has no raw counts; several layers have them, or none has.
    """
    if layer is None:
        chosen = (
            _find_layer(contents, fractional=False) or (round_counts and _find_layer(contents, fractional=True)) or "X"
        )
    else:
        chosen = RAW if layer == "raw" and layer not in contents.matrices else layer
    if chosen not in contents.matrices:
        raise ValueError(f"{contents.name} has no layer {chosen!r}; its layers are {list(contents.matrices)}")
    _require_shape(contents, chosen)
    head = read_head(contents, chosen)
    try:
        _require_counts(head, f"layer {chosen!r} of {contents.name}", fractional=round_counts)
    except ValueError as error:
        raise _explain(error, contents, chosen, head) from error
    if round_counts:
        _log_rounding(head, f"layer {chosen!r} of {contents.name}")
    return chosen


def _find_layer(contents: Contents, *, fractional: bool) -> str | None:
    """Return `X` if it holds raw counts, else the only layer named for them that does, else None."""
    if _looks_raw(contents, "X", fractional=fractional):
        return "X"
    named = [name for name in contents.matrices if name != "X" and _simplify(name) in COUNT_NAMES]
    raw = [name for name in named if _looks_raw(contents, name, fractional=fractional)]
    if len(raw) != 1:
        return None
    logger.warning(
        "%s: X does not hold raw counts; using %s, which does (choose another with --layer)",
        *(contents.name, raw[0] if raw[0] == RAW else f"layer {raw[0]!r}"),
    )
    return raw[0]


def _simplify(name: str) -> str:
    return name.lower().translate({ord(mark): None for mark in "_- ."})


def _require_shape(contents: Contents, layer: str) -> None:
    """Raise unless a layer is a numeric matrix of the cells and genes of the file."""
    matrix, expected = contents.matrices[layer], (len(contents.obs), len(contents.genes_of(layer)))
    if tuple(matrix.shape) != expected or matrix.dtype.kind not in "biuf":
        raise ValueError(
            f"{contents.name}: expected a numeric matrix of shape (cells, genes) = {expected} in layer {layer!r}, "
            f"found {matrix.dtype} of shape {tuple(matrix.shape)}"
        )


def _require_counts(head: csr_matrix, where: str, *, fractional: bool) -> None:
    """Raise unless the first cells of a layer hold raw counts, or, with `fractional`, what can be rounded to them."""
    require_counts(head, where, whole=not fractional)
    if fractional and _is_normalized(head):
        raise ValueError(
            f"cannot round {where}: all cells have the same sum, so the values are normalized and no counts; choose "
            "the layer with counts: --layer NAME (layer='NAME' in Python)"
        )


def _log_rounding(head: csr_matrix, where: str) -> None:
    n_fractional = int(np.count_nonzero(head.data != np.floor(head.data)))
    if not n_fractional:
        return
    logger.warning("%s: rounding counts; %d of the first %d are fractional", where, n_fractional, head.nnz)
    if head.data.max() < LOGARITHMS:
        logger.warning(
            "%s: the largest of these is only %.3g; make sure that they are counts and not logarithms",
            *(where, head.data.max()),
        )


def describe_layers(contents: Contents) -> dict[str, str]:
    """Return for each layer of a file whether its first cells hold raw counts, or why they do not.

    Returns:
        Name of the layer → "raw counts", or a few words such as "normalized" or "fractional values".
    """
    return {layer: _describe_layer(contents, layer) for layer in contents.matrices}


def _describe_layer(contents: Contents, layer: str) -> str:
    try:
        _require_shape(contents, layer)
    except ValueError:
        return "not a numeric matrix of these cells and genes"
    head = read_head(contents, layer)
    if found := find_invalid_counts(head.data):
        what, _ = found
        if what == "fractional" and _is_normalized(head):
            return "normalized"
        return "values that are not finite" if what == "not finite" else f"{what} values"
    return "raw counts" if head.nnz else "raw counts, but the first cells have none"


def read_head(contents: Contents, layer: str) -> csr_matrix:
    """Return the first cells of a layer as float32. Shape (cells, genes)."""
    matrix = contents.matrices[layer]
    return read_rows(matrix, np.arange(min(CELLS_CHECKED, matrix.shape[0])), contents.name, whole=False)


def _is_normalized(matrix: csr_matrix) -> bool:
    """Return whether fractional values have the same sum in all cells, or are logarithms of values that have.

    Args:
        matrix: values >= 0. Shape (cells, genes).

    Source: `scanpy.pp.normalize_total` and `scanpy.pp.log1p`.
    """
    if not (matrix.data != np.floor(matrix.data)).any():
        return False
    for values in (matrix, matrix.expm1()) if matrix.data.max() < LOGARITHMS else (matrix,):
        sums = np.asarray(values.sum(axis=1, dtype=np.float64)).ravel()
        sums = sums[sums > 0]
        if len(sums) > 1 and np.ptp(sums) < EQUAL_SUMS * sums.mean():
            return True
    return False


def _explain(error: ValueError, contents: Contents, chosen: str, head: csr_matrix) -> ValueError:
    """Return an error of `_require_counts` with the other layers, and how to round fractional counts."""
    others = {layer: _looks_raw(contents, layer, fractional=False) for layer in contents.matrices if layer != chosen}
    if "fractional" in str(error) and not _is_normalized(head):
        error = ValueError(
            f"{error}; if they are estimates of counts, e.g. by RSEM or after removing ambient RNA, round them: "
            "--round_counts (round_counts=True)"
        )
    return name_layers(error, others)


def _looks_raw(contents: Contents, layer: str, *, fractional: bool) -> bool:
    """Return whether a layer of a file can hold its raw counts."""
    if layer not in contents.matrices:
        return False
    try:
        _require_shape(contents, layer)
        _require_counts(read_head(contents, layer), "", fractional=fractional)
    except ValueError:
        return False
    return True
