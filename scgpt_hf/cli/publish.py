"""Publish a finished run as a model on the Hub, or a cache as a dataset.

  scgpt-hf publish runs/demo ORG/NAME               weights, code, processor, settings, split, figures, card
  scgpt-hf publish runs/types ORG/TYPES --private   a fine-tuned model, in a private repository
  scgpt-hf publish my_cache ORG/CELLS               a cache, for datasets.load_dataset and hf://datasets/ORG/CELLS

Log in with `hf auth login` first, or set HF_TOKEN. The repository is created if it does not exist. Running the command
again sends only what changed, or what is missing after an interruption. To publish during training, pass
--push_to_hub true to scgpt-hf pretrain.
"""

import argparse
from pathlib import Path

from scgpt_hf.cells.cache.manifest import GENES
from scgpt_hf.cli.process import accept_any_locale, exit_with_error
from scgpt_hf.publishing.publish_cache import publish_cache
from scgpt_hf.publishing.publish_run import publish
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, publish the folder, and print its address."""
    accept_any_locale()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a finished run, or of a cache")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch, created if it does not exist; for runs only (default: main)")
    settings = parser.parse_args(arguments)
    folder, repo_id, private, revision = vars(settings).values()
    try:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        if not (folder / GENES).is_file():  # only caches have this file
            address = publish(folder, repo_id, private=private, revision=revision)
        elif revision is None:
            address = publish_cache(folder, repo_id, private=private)
        else:
            raise ValueError(f"{folder} is a cache, and caches are always published on main; remove --revision")
    except (OSError, ValueError) as error:
        exit_with_error(error)
    print(f"Published at {address}")


if __name__ == "__main__":
    main()
