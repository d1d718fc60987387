"""How a Census is laid out on disk: its columns, tiles and filters.

Source: chanzuckerberg/cellxgene-census,
tools/cellxgene_census_builder/src/cellxgene_census_builder/build_soma/globals.py.
"""

from typing import Any

import pyarrow as pa

ONTOLOGIES = (
    *("assay", "cell_type", "development_stage", "disease", "self_reported_ethnicity", "sex", "tissue"),
    "tissue_general",
)
OBS_LABELS = (
    *("dataset_id", "donor_id", "suspension_type", "tissue_type"),
    *(column for name in ONTOLOGIES for column in (name, f"{name}_ontology_term_id")),
)
OBS_NUMBERS = ("raw_sum", "nnz", "raw_mean_nnz", "raw_variance_nnz", "n_measured_vars")
TILE = 2048  # cells and genes; so the cells of an aligned chunk, the cheapest to read (`plan.CHUNK_SIZE`)

_ZSTD = {"_type": "ZstdFilter", "level": 9}
_NUMBER = ["ByteShuffleFilter", _ZSTD]
_JOINID = ["DoubleDeltaFilter", {"_type": "ZstdFilter", "level": 19}]


def x_storage() -> dict[str, Any]:
    """Return how X is stored, as a platform configuration of tiledbsoma."""
    return {
        "tiledb": {
            "create": {
                "capacity": 2**16,
                "dims": {
                    "soma_dim_0": {"tile": TILE, "filters": [_ZSTD]},
                    "soma_dim_1": {"tile": TILE, "filters": _NUMBER},
                },
                "attrs": {"soma_data": {"filters": _NUMBER}},
                "cell_order": "row-major",
                "tile_order": "row-major",
                "allows_duplicates": True,
            }
        }
    }


def table_storage(schema: pa.Schema) -> dict[str, Any]:
    """Return how obs, var or another table is stored: numbers shuffled by byte, the rest as it is, all compressed."""
    numeric = [pa.types.is_integer(field.type) or pa.types.is_floating(field.type) for field in schema]
    attrs = {
        field.name: {"filters": _NUMBER if number else [_ZSTD]}
        for field, number in zip(schema, numeric, strict=True)
        if field.name != "soma_joinid"
    }
    return {
        "tiledb": {
            "create": {
                "capacity": 2**16,
                "dims": {"soma_joinid": {"filters": _JOINID}},
                "attrs": attrs,
                "offsets_filters": _JOINID,
                "allows_duplicates": True,
            }
        }
    }
