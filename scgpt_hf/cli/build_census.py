#!/usr/bin/env python
"""Build a local SOMA in the layout of the CELLxGENE Census from your own .h5ad files.

Example:
    python scripts/build_census.py data/*.h5ad --out my_census
    accelerate launch scripts/pretrain.py --data my_census

Each file becomes one dataset. It must hold raw counts (whole numbers) and obs['donor_id'], by which cells are split.
Genes are joined by Ensembl id, taken from the index of var or from a column such as feature_id or gene_ids. The other
obs columns of the Census (cell_type, assay, tissue_general, disease, suspension_type, is_primary_data ...) are taken
where present and 'unknown' where not. Files are checked on the way; a build that fails leaves nothing behind.
"""

import argparse
import logging
import sys

from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cli.process import tune_process


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, build, and say where the result lies."""
    tune_process()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE.h5ad", help="one or many .h5ad files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--organism", default="homo_sapiens", help="name of the organism (default: %(default)s)")
    parser.add_argument("--layer", help="layer with the raw counts, or .raw for AnnData's own (default: X)")
    parser.add_argument(
        "--keep_obs", nargs="*", default=[], metavar="COLUMN", help="obs columns to keep besides those of the Census"
    )
    settings = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = build_census(
            settings.files,
            settings.out,
            organism=settings.organism,
            layer=settings.layer,
            keep_obs=settings.keep_obs,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {folder}; train on it with: accelerate launch scripts/pretrain.py --data {folder}")


if __name__ == "__main__":
    main()
