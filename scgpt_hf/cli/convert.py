"""Convert an original scGPT checkpoint: args.json, vocab.json and best_model.pt become a folder transformers loads.

  python scripts/convert.py scGPT_human --out models/scgpt_human
  python scripts/convert.py my_finetuned --out models/mine --cell_pooling average --cls_value 0

Then, with raw counts in cells.h5ad:

  python scripts/embed.py cells.h5ad --model models/scgpt_human --out embedded.h5ad

Every key of best_model.pt is taken, or reported with the reason why not, or an error. What keys and shapes tell is
inferred (values, heads, batch labels, domain-specific batch norm, explicit zeros, classes). What no file records is
asked for by the options below; what is not given takes the value of the published checkpoints and is reported.
"""

import argparse
import sys
from typing import Any

from scgpt_hf.conversion.checkpoint import convert_scgpt, save_converted


def main() -> None:
    """Read the command line, convert, say what became of the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="holds args.json, vocab.json and best_model.pt")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--weights_file", default="best_model.pt", help="name of the state dict (default: %(default)s)")
    asked = parser.add_argument_group("what the files do not record")
    add: Any = asked.add_argument
    add("--norm_scheme", choices=("post", "scgpt_pre"), help="scgpt_pre if made with pre_norm=True (default: post)")
    add(
        "--cell_pooling",
        choices=("cls", "average", "weighted"),
        help="the original's cell_emb_style: cls, avg-pool, w-pool (default: cls)",
    )
    add(
        "--gepc_detach",
        action=argparse.BooleanOptionalAction,
        help="if made with mvc_decoder_style='inner product, detach'; changes training only (default: no)",
    )
    add("--ecs_threshold", type=float, help="of the ECS objective; changes training only (default: 0.3)")
    add(
        "--cls_value",
        type=float,
        help="value that <cls> carries: 0 after the original's fine-tuning tokeniser (default: pad_value of args.json, "
        "-2 in published checkpoints)",
    )
    options = vars(parser.parse_args())
    folder, out = options.pop("folder"), options.pop("out")
    try:
        model, processor, report = convert_scgpt(folder, **{k: v for k, v in options.items() if v is not None})
        save_converted(model, processor, report, out)
    except (OSError, ValueError) as error:
        sys.exit(f"convert.py: {error}")
    print(
        f"{report}\nwrote {out}: AutoModel, AutoModelForPreTraining and AutoProcessor load it; <cls> carries ", end=""
    )
    print(f"{processor.cls_value:g}")


if __name__ == "__main__":
    main()
