"""Find the obs columns that name donors, batches or labels of cells, for the report on a file.

Any column of groups can serve for each of these; the names that are usual in the field say which one is meant.
"""

import re
from dataclasses import dataclass

import pandas as pd

from scgpt_hf.cells.missing import has_label, has_value

DONOR, BATCH, LABEL = "donor", "batch", "label"
# Names in lower case, letters and digits only: of the CELLxGENE schema, of Seurat and of scanpy's tutorials.
_DONORS = r"donor|patient|subject|individual|mouseid|^sample(id|name)?$|^origident$"
_BATCHES = r"batch|datasetid|^dataset$|^assay$|^chemistry$|^library(id)?$|^channel$|^lane$|^run(id)?$"
_LABELS = r"celltype|cellclass|annotation|^labels?$|^celllabels?$|cluster|^louvain|^leiden"
_MOST_GROUPS = 100  # of a column without a known role
_ROLES = {DONOR: _DONORS, BATCH: _BATCHES, LABEL: _LABELS}


@dataclass(frozen=True)
class GroupColumn:
    """An obs column that divides the cells into groups.

    Attributes:
        name: the column.
        role: "donor", "batch" or "label", by its name; "" for other columns.
        n_groups: number of different values.
        n_missing: cells without a value.
    """

    name: str
    role: str
    n_groups: int
    n_missing: int


def find_group_columns(obs: pd.DataFrame) -> list[GroupColumn]:
    """Return the columns that divide the cells into groups, those with a known role first.

    A column whose name has a known role may have a single group. Measurements (floating-point numbers, and whole
    numbers with many values) and columns with a different value in most cells are left out. Missing values are no
    groups, and "unknown" is no label.

    Args:
        obs: all columns. Shape (cells, columns).

    Example:
        >>> obs = pd.DataFrame({"patient": ["a", "a", "b", "b"], "n_genes": [0.5, 0.1, 0.7, 0.3]})
        >>> find_group_columns(obs)
        [GroupColumn(name='patient', role='donor', n_groups=2, n_missing=0)]
    """
    found = []
    for name, column in obs.items():
        if column.dtype.kind in "fc" or column.dtype.kind == "M":
            continue
        try:
            present = has_label(column) if role_of(str(name)) == LABEL else has_value(column)
            n_groups = column[present].nunique()
        except TypeError:  # lists and dictionaries cannot be compared
            continue
        role = role_of(str(name))
        most = len(obs) // 2 if role else min(_MOST_GROUPS, len(obs) // 2)
        if (1 if role else 2) <= n_groups <= max(2, most):
            found.append(GroupColumn(str(name), role, n_groups, int((~present).sum())))
    roles = [*_ROLES, ""]
    return sorted(found, key=lambda column: roles.index(column.role))


def role_of(name: str) -> str:
    """Return the role that a column of this name usually has: "donor", "batch", "label", or "" if it is not known.

    Example:
        >>> role_of("Patient_ID"), role_of("cell_type"), role_of("n_genes")
        ('donor', 'label', '')
    """
    simple = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((role for role, pattern in _ROLES.items() if re.search(pattern, simple)), "")
