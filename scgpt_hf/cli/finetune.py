"""Fine-tune a pretrained model: to name cell types, or to bring experimental batches together.

  python scripts/finetune.py data.h5ad --model runs/demo/best_model --labels_key cell_type --out runs/types
  python scripts/finetune.py data.h5ad --model ORG/NAME --labels_key cell_type --out runs/types --train lora
  python scripts/finetune.py a.h5ad b.h5ad --task integrate --model ORG/NAME --batch_key assay --out runs/joined

The first two leave a classifier for scripts/annotate.py, the third an encoder for scripts/embed.py, in OUT/best_model,
with report.html, summary.json, metrics, split and settings beside it. `--task integrate --help` tells its flags.
A run that was interrupted cannot be resumed: remove OUT and start it again.
"""

import logging
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from transformers import HfArgumentParser

from scgpt_hf.cli.process import tune_process
from scgpt_hf.reporting.report import write_report
from scgpt_hf.training.finetuning.annotate import finetune_classifier
from scgpt_hf.training.finetuning.integrate import finetune_integration
from scgpt_hf.training.finetuning.settings import AnnotateSettings, IntegrateSettings

TASKS = {"annotate": (AnnotateSettings, finetune_classifier), "integrate": (IntegrateSettings, finetune_integration)}


class Teach(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the examples as they are, and every default."""


def main() -> None:
    """Read the command line, fine-tune, say what was learned."""
    tune_process()
    task = ArgumentParser(add_help=False, allow_abbrev=False)
    task.add_argument("--task", choices=TASKS, default="annotate", help="what to fine-tune for")
    chosen, rest = task.parse_known_args()
    settings_of: Any
    finetune: Any
    settings_of, finetune = TASKS[chosen.task]
    parser = HfArgumentParser(
        settings_of, parents=[task], description=__doc__, formatter_class=Teach, allow_abbrev=False
    )
    parser.add_argument("data", nargs="+", help=".h5ad files with raw counts, or one SOMA")
    try:
        settings, asked = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("scgpt_hf").setLevel(logging.INFO)
        summary = finetune(asked.data, settings)
        write_report(settings.out)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        sys.exit(f"finetune.py: {error}")
    if chosen.task == "annotate":
        held_out, baseline = summary["validation"], summary["majority_baseline"]
        print(
            f"{summary['validation_cells']:,} held-out cells, {len(summary['labels'])} labels: "
            f"macro-F1 {held_out['macro_f1']:.3f}, accuracy {held_out['accuracy']:.3f}; always "
            f"{baseline['label']!r}: {baseline['macro_f1']:.3f}, {baseline['accuracy']:.3f}."
        )
    else:
        cells = sum(sum(parts.values()) for parts in summary["domains"].values())
        print(f"{cells:,} cells of {len(summary['domains'])} domains; new in the model: {', '.join(summary['new'])}.")
    print(f"Everything is in {settings.out}: best_model/ report.html summary.json metrics.jsonl split.json")


if __name__ == "__main__":
    main()
