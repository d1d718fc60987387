"""Convert a checkpoint of scGPT's code to a folder that transformers can load.

Examples:
  scgpt-hf convert scGPT_human --out models/scgpt_human
  scgpt-hf convert my_finetuned --out models/mine --cell_pooling average --cls_value 0
  scgpt-hf convert my_multiomic --out models/multiomic --modalities RNA Protein "<pad>" "<cls>" \
      --gene_modalities proteins.json

Then embed the cells of an .h5ad file with raw counts:
  scgpt-hf embed cells.h5ad --model models/scgpt_human --out embedded.h5ad

A checkpoint of scGPT's code is a folder with args.json, vocab.json and best_model.pt. Every key of best_model.pt is
converted, or left out for a reason that is printed, or stops the conversion. Most settings are read from args.json, or
inferred from the keys and shapes of the weights: how values are embedded, the heads, batch labels, domain-specific
batch norm, explicit zeros, classes. A few settings are recorded nowhere. Pass them with the options below; those that
you leave out take their values in the published checkpoints, and are printed as assumed.
"""

import argparse
import json
from typing import Any

from scgpt_hf.cli.process import accept_any_locale, exit_with_error, hide_short_progress_bars
from scgpt_hf.conversion.checkpoint import convert_scgpt, require_new_folder, save_converted
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Convert the checkpoint given on the command line, and print the report."""
    accept_any_locale()
    options = vars(_make_parser().parse_args(arguments))
    folder, out = options.pop("folder"), options.pop("out")
    try:
        require_new_folder(out)
        model, processor, report = convert_scgpt(folder, **{k: v for k, v in options.items() if v is not None})
        hide_short_progress_bars()
        save_converted(model, processor, report, out)
    except (OSError, ValueError) as error:
        exit_with_error(error)
    print(report)
    print(f"value of <cls>: {processor.cls_value:g}")
    print(f"wrote {out}; load it with AutoModel, AutoModelForPreTraining and AutoProcessor")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="folder with args.json, vocab.json and the weights")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create; it must not exist yet")
    parser.add_argument(
        "--weights_file",
        default="best_model.pt",
        help="file name of the state dict, .pt or .safetensors (default: %(default)s, or the only .safetensors file)",
    )
    # Without argparse defaults: `convert_scgpt` knows them, and reports as assumed what is not passed.
    add: Any = parser.add_argument_group("settings that the files do not record").add_argument
    add(
        "--norm_scheme",
        choices=("post", "scgpt_pre"),
        help="scgpt_pre if the model was trained with pre_norm=True (default: post)",
    )
    add(
        "--cell_pooling",
        choices=("cls", "average", "weighted"),
        help="for scGPT's cell_emb_style cls, avg-pool or w-pool (default: cls)",
    )
    add(
        "--gepc_detach",
        action=argparse.BooleanOptionalAction,
        help="if the model was trained with mvc_decoder_style='inner product, detach'; only changes further training "
        "(default: no)",
    )
    add(
        "--ecs_threshold",
        type=float,
        help="similarity threshold of the ECS objective; only changes further training (default: 0.3)",
    )
    add(
        "--cls_value",
        type=float,
        help="value of the token <cls>; 0 for a model trained with scGPT's fine-tuning tokenizer "
        "(default: pad_value of args.json, which is -2 in the published checkpoints)",
    )
    add(
        "--modalities",
        nargs="+",
        metavar="NAME",
        help="of a multi-omic model: names of its modalities in the order of its vocab_mod, with '<pad>' and '<cls>' "
        "(default: its expression heads are left out)",
    )
    add(
        "--gene_modalities",
        metavar="FILE",
        type=_read_gene_modalities,
        help='of a multi-omic model: JSON file with the modality of genes, such as {"CD4_TotalSeqB": "Protein"} '
        "(default: all genes have the first of --modalities)",
    )
    return parser


def _read_gene_modalities(path: str) -> dict[str, str]:
    """Return gene → modality from a JSON file.

    Raises:
        argparse.ArgumentTypeError: the file cannot be read, or is something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(modality, str) for modality in found.values()):
        raise argparse.ArgumentTypeError(f'{path}: expected an object such as {{"CD4_TotalSeqB": "Protein"}}')
    return found


if __name__ == "__main__":
    main()
