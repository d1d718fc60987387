"""Embed cells with a pretrained model, one vector per cell: of a file into obsm, or of a whole Census into Parquet.

  scgpt-hf embed data.h5ad --out embedded.h5ad  # with blood-mini, a small model in the package
  scgpt-hf embed data.h5ad --model runs/demo/best_model --out embedded.h5ad
  scgpt-hf embed data.h5ad --model OWNER/NAME --out embedded.h5ad --layer counts --batch_size 256

The file may be larger than memory. It needs raw counts and genes by Ensembl id or symbol. Then, in scanpy:

  adata = scanpy.read_h5ad("embedded.h5ad")
  scanpy.pp.neighbors(adata, use_rep="X_scgpt"); scanpy.tl.umap(adata); scanpy.tl.leiden(adata)

adata.uns["X_scgpt"] records the model and how many genes of the data are in its vocabulary.

A Census, a local SOMA or a cache is embedded into a folder of Parquet files, in this process or in many:

  scgpt-hf embed census://2025-11-08/homo_sapiens --model M --out DIR --empty nan --columns cell_type tissue
  scgpt-hf embed CENSUS --model M --out DIR --obs_filter "tissue_general == 'blood'"
  scgpt-hf embed CENSUS --model M --out DIR --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT    in an array
  scgpt-hf embed CENSUS --model M --out DIR --finish                                                after the array
  scgpt-hf embed CENSUS --model M --out DIR --ray                                                   on a Ray cluster

After an interruption, run the same command again: finished files are verified by their hash, not written again.
pandas.read_parquet("DIR") and datasets.load_dataset("parquet", data_files="DIR/*.parquet") open the files.
"""

import argparse
import logging
import sys
from pathlib import Path

from scgpt_hf.analysis.embed import KEY
from scgpt_hf.analysis.embed_census import plan_embeddings
from scgpt_hf.analysis.embed_file import embed_file
from scgpt_hf.cells.files.formats import SUPPORTED, find_format
from scgpt_hf.cells.source import open_source
from scgpt_hf.cli.inference_arguments import add_inference_arguments
from scgpt_hf.cli.job_arguments import add_job_arguments, run_jobs
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, program_name, show_log, tune_process
from scgpt_hf.output import require_writable_file
from scgpt_hf.packaged_models import DEFAULT_MODEL, packaged_model
from scgpt_hf.pretrained import load_model
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, embed the cells, and print a summary."""
    accept_any_locale()
    tune_process()
    options = _parse(arguments)
    if options.model is None:
        options.model = DEFAULT_MODEL
        print(
            f"No --model: using {DEFAULT_MODEL}, a small model of human blood and marrow cells that comes with the "
            f"package. Its card, with results and limits: {packaged_model() / 'README.md'}"
        )
    try:
        if _is_file(options.data):
            _embed_file(options)
        else:
            _embed_census(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print(f"\n{program_name()}: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


def _is_file(data: str) -> bool:
    return "://" not in data and find_format(Path(data)) is not None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; exit if one does not apply to the data."""
    of_census = argparse.ArgumentParser(add_help=False)
    group = of_census.add_argument_group("options of a Census, a local SOMA or a cache")
    group.add_argument(
        "--columns", nargs="*", default=[], metavar="COLUMN", help="obs columns to write beside the vectors"
    )
    group.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="type of the vectors (default: %(default)s)"
    )
    add_job_arguments(group)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter, parents=[of_census])
    parser.add_argument(
        "data", help=f"file with raw counts: {SUPPORTED}; or census://VERSION/ORGANISM, a local SOMA or a cache"
    )
    parser.add_argument(
        "--model",
        help="folder of a saved model, its repository on the Hub, or the name of a model of the package (default: "
        f"{DEFAULT_MODEL}, a small model of human blood and marrow cells)",
    )
    parser.add_argument("--out", required=True, help="file to write: the data with the embedding added; or a folder")
    parser.add_argument("--key_added", default=KEY, help="name in obsm and uns of a file (default: %(default)s)")
    add_inference_arguments(parser, empty="write NaN", replaced="an embedding of that name")
    options = parser.parse_args(arguments)
    is_file = _is_file(options.data)
    of_file = {"key_added": KEY, "round_counts": False, "overwrite": False}
    for name, default in (vars(of_census.parse_args([])) if is_file else of_file).items():
        if getattr(options, name) != default:
            kind = "a file" if is_file else "no file"
            parser.error(f"--{name} does not apply to {options.data}, which is {kind}")
    return options


def _embed_file(options: argparse.Namespace) -> None:
    """Embed a file and print a summary."""
    require_writable_file(options.out, overwrite=options.overwrite)
    model, processor = load_model(options.model, device=options.device)
    names = ("key_added", "layer", "round_counts", "overwrite", "batch_size", "empty")
    report = embed_file(options.data, options.out, model, processor, **{name: getattr(options, name) for name in names})
    genes = report["genes"]
    print(
        f"Embedded {report['cells'] - report['empty_cells']:,} of {report['cells']:,} cells with {report['model']}.\n"
        f"Genes: {genes['by_id']:,} matched by id, {genes['by_symbol']:,} by symbol, "
        f"{genes['duplicates']:,} duplicates, {genes['unknown']:,} unknown; the vocabulary has {genes['vocabulary']:,}."
    )


def _embed_census(options: argparse.Namespace) -> None:
    """Embed the cells of a source in jobs, and print whether the folder is complete."""
    show_log(logging.INFO)
    source = open_source(
        options.data, obs_filter=options.obs_filter, layer=options.layer, primary_only=not options.all_cells
    )
    names = ("device", "columns", "dtype", "cells_per_shard", "batch_size", "empty")
    chosen = {name: getattr(options, name) for name in names}
    jobs = plan_embeddings(source, options.out, options.model, **chosen)
    if run_jobs(jobs, options, use_gpu=options.device != "cpu"):
        print(f"{options.out} is complete: {len(jobs.cell_ids):,} cells; pandas.read_parquet opens it")


if __name__ == "__main__":
    main()
