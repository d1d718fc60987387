"""The storage layout of a Census: columns of obs, tiles and compression filters.

Source: chanzuckerberg/cellxgene-census,
tools/cellxgene_census_builder/src/cellxgene_census_builder/build_soma/globals.py.
"""

from typing import Any

import pyarrow as pa

from scgpt_hf.cells.block import CHUNK_SIZE

ONTOLOGIES = (
    *("assay", "cell_type", "development_stage", "disease", "self_reported_ethnicity", "sex", "tissue"),
    "tissue_general",
)
OBS_LABELS = (
    *("dataset_id", "donor_id", "suspension_type", "tissue_type"),
    *(column for name in ONTOLOGIES for column in (name, f"{name}_ontology_term_id")),
)
OBS_NUMBERS = ("raw_sum", "nnz", "raw_mean_nnz", "raw_variance_nnz", "n_measured_vars")
TILE = CHUNK_SIZE  # cells and genes of a tile; a chunk, the unit of reading, has the cells of one row of tiles

PRESENCE = "feature_dataset_presence_matrix"  # within the measurement: 1 where a data set measured a gene

_ZSTD = {"_type": "ZstdFilter", "level": 9}
_NUMBER = ["ByteShuffleFilter", _ZSTD]
_JOINID = ["DoubleDeltaFilter", {"_type": "ZstdFilter", "level": 19}]


def x_storage() -> dict[str, Any]:
    """Return the storage options of X as a platform configuration of tiledbsoma."""
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
    """Return the storage options of obs, var or another table.

    All columns are compressed. The bytes of numbers are shuffled before, because similar bytes compress better.

    Args:
        schema: columns of the table, with `soma_joinid`.
    """
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
