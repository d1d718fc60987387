"""Build a local SOMA in the layout of the CELLxGENE Census from your own files.

Examples:
  scgpt-hf build-census data/*.h5ad --out my_census
  scgpt-hf build-census */outs/filtered_feature_bc_matrix.h5 --donor_key dataset_id --out my_census
  scgpt-hf pretrain --data my_census

Each file becomes one dataset, named by the file or, where files share a name, by the folder. A file needs raw counts
and an obs column with donors, because training and validation cells are split by donor. Genes of different files are
matched by Ensembl id, from the index of var or from a column such as feature_id or gene_ids. The other obs columns of
the Census (cell_type, assay, tissue_general, disease, suspension_type, is_primary_data and more) are copied if a file
has them, and filled with "unknown" or, for is_primary_data, with True if not. All files are checked; a build that fails
leaves no folder.
"""

import argparse
import logging

from scgpt_hf.cells.files.formats import SUPPORTED
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, show_log, tune_process
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Build the Census given on the command line."""
    accept_any_locale()
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help=f"one or more files: {SUPPORTED}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create; it must not exist yet")
    parser.add_argument("--organism", default="homo_sapiens", help="name of the organism (default: %(default)s)")
    parser.add_argument(
        "--layer", help="layer with the raw counts, or .raw for AnnData.raw (default: the one with them)"
    )
    parser.add_argument("--round_counts", action="store_true", help="round fractional counts instead of stopping")
    parser.add_argument(
        "--donor_key",
        default="donor_id",
        metavar="COLUMN",
        help="obs column with the donors; dataset_id if each file is one donor (default: %(default)s)",
    )
    parser.add_argument(
        "--keep_obs",
        nargs="*",
        default=[],
        metavar="COLUMN",
        help="more obs columns to copy, besides those of the Census",
    )
    settings = parser.parse_args(arguments)
    show_log(logging.INFO)
    try:
        folder = build_census(
            settings.files,
            settings.out,
            organism=settings.organism,
            layer=settings.layer,
            round_counts=settings.round_counts,
            donor_key=settings.donor_key,
            keep_obs=settings.keep_obs,
        )
    except (ValueError, OSError) as error:
        exit_with_error(error)
    print(f"wrote {folder}; train on it with: scgpt-hf pretrain --data {folder}")


if __name__ == "__main__":
    main()
