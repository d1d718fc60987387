"""Run the tests that transformers runs on each of its models on ours.

  python scripts/conformance.py                 download the tests of the installed transformers, and run them
  python scripts/conformance.py -k save_load    run those with save_load in their name; all options go to pytest

The tests are part of the source package of transformers, not of the installed library. pip downloads it, and it is
unpacked in a cache folder outside of the repository. The last lines list the tests that were skipped or adapted, with
the reasons.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

# Test classes that are missing from the source package. They are about export to other formats and text generation, so
# empty classes replace them.
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
TESTER = Path(__file__).resolve().parents[1] / "tests" / "conformance" / "check_model.py"


def fetch_tests(folder: Path) -> None:
    """Download the tests of the installed transformers into the folder, as the package `transformers_tests`."""
    package, pip = folder / "transformers_tests", [sys.executable, "-m", "pip", "--quiet"]
    requirement = f"transformers=={version('transformers')}"
    options = ["--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
    subprocess.run([*pip, "download", *options, requirement], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), "parameterized"], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as source:
        source.extractall(folder, filter="data")
    next(folder.glob("transformers-*/tests")).replace(package)
    for name, mixin in ABSENT.items():
        (package / name).parent.mkdir()
        (package / name).write_text(f"class {mixin}:\n    pass\n")


def main() -> None:
    """Download the tests if they are missing, run them, and exit with the code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "scgpt_hf"
    parser.add_argument("--cache", type=Path, default=cache, help="where to unpack the tests (default: %(default)s)")
    settings, options = parser.parse_known_args()
    folder = settings.cache / f"transformers-{version('transformers')}"
    if not (folder / "transformers_tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        fetch_tests(folder)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    sys.exit(subprocess.run([*pytest, "--disable-warnings", str(TESTER), *options], env=environment).returncode)


if __name__ == "__main__":
    main()
