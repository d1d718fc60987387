"""Put a finished run on the Hub as a model, or a cache as a dataset.

  python scripts/publish.py runs/demo ORG/NAME               weights, code, processor, settings, split, figures, card
  python scripts/publish.py runs/types ORG/TYPES --private   a fine-tuned model, for its owner alone
  python scripts/publish.py my_cache ORG/CELLS               a cache, for datasets.load_dataset and hf://datasets/ORG/CELLS

Log in with `hf auth login` before, or set HF_TOKEN. The repository is made if it does not exist. The same again sends
only what changed, or what an interruption left out. To publish while training, give pretrain.py --push_to_hub.
"""

import argparse
import sys
from pathlib import Path

from scgpt_hf.cells.cache.manifest import GENES
from scgpt_hf.publishing.hub import publish
from scgpt_hf.publishing.hub_cache import publish_cache


def main() -> None:
    """Read the command line, publish, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run that has ended, or of a cache")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository of the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="for its owner alone, if it is new")
    parser.add_argument("--revision", help="branch, made if it does not exist; of a run only (default: main)")
    settings = parser.parse_args()
    folder, repo_id, private, revision = vars(settings).values()
    try:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        if not (folder / GENES).is_file():
            address = publish(folder, repo_id, private=private, revision=revision)
        elif revision is None:
            address = publish_cache(folder, repo_id, private=private)
        else:
            raise ValueError(f"{folder} is a cache, and those are published on main; leave --revision out")
    except (OSError, ValueError) as error:
        sys.exit(f"publish.py: {error}")
    print(f"Published at {address}")


if __name__ == "__main__":
    main()
