"""The console command `scgpt-hf`: list the commands, or run one of them.

Each command is a module of `scgpt_hf.cli`. Only the module of the command that runs is imported, because most of them
import torch, which takes seconds.
"""

import sys
from importlib import import_module
from importlib.metadata import version

# Name → module of `scgpt_hf.cli`, and what the command does.
COMMANDS = {
    "pretrain": ("pretrain", "pretrain a gene transformer, from a Census query to a checkpoint"),
    "finetune": ("finetune", "fine-tune a pretrained model to predict cell types"),
    "check": ("check", "check a file before any work: raw counts, genes, obs columns, time and memory"),
    "embed": ("embed", "embed the cells of a file, or of a Census, with a pretrained model"),
    "integrate": ("finetune", "integrate batches: fine-tune an encoder that mixes them"),
    "annotate": ("annotate", "annotate the cells of a file with their types"),
    "evaluate": ("evaluate", "score the embeddings of labelled cells, and baselines on the same cells"),
    "perturb": ("perturbation.perturb", "predict what genetic perturbations do: train, predict, evaluate"),
    "convert": ("convert", "convert a checkpoint of scGPT to a folder that transformers can load"),
    "build-census": ("build_census", "build a local SOMA in the layout of the Census from files"),
    "cache": ("cache", "copy the cells of a Census into a cache that is read in any order"),
    "report": ("report", "write report.html into the folder of a run"),
    "publish": ("publish", "publish a run as a model on the Hub, or a cache as a dataset"),
}
# Command → arguments that come before those of the user.
_FIRST_ARGUMENTS = {"integrate": ["--task", "integrate"]}


def main() -> None:
    """Run the command that the first argument names, with the other arguments."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(help_text())
        return
    if sys.argv[1] == "--version":
        print(f"scgpt_hf {version('scgpt_hf')}")
        return
    name, arguments = sys.argv[1], sys.argv[2:]
    if name not in COMMANDS:
        sys.exit(f"scgpt-hf: unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    # Commands take the name in their help and errors from here.
    sys.argv = [f"scgpt-hf {name}", *arguments]
    import_module(f"scgpt_hf.cli.{COMMANDS[name][0]}").main([*_FIRST_ARGUMENTS.get(name, []), *arguments])


def help_text() -> str:
    """Return the commands, one on each line, and examples."""
    commands = "\n".join(f"  {name:14}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"usage: scgpt-hf COMMAND ...\n\n{commands}\n\n`scgpt-hf COMMAND --help` shows examples and all options of a "
        "command.\n\n  scgpt-hf pretrain                                      train a small model on 700 blood cells\n"
        "  scgpt-hf embed my.h5ad --model M --out out.h5ad        embed your cells with the model M\n"
        "  accelerate launch -m scgpt_hf.cli.pretrain blood-300k  train on several GPUs"
    )


if __name__ == "__main__":
    main()
