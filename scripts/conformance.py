"""Run transformers' own tests of every model on ours.

  python scripts/conformance.py                 fetch the tests of the installed transformers, and run all of them
  python scripts/conformance.py -k save_load    only those whose name says so; every option is pytest's

The tests are not part of the installed library, but of its source package: it is fetched by pip and unpacked outside
of the repository, in a cache folder. Printed in the end: what was skipped and why, and what we had to adapt.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

# Parts of the library's tests that are not in its source package: they export to other formats, and generate text.
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
TESTER = Path(__file__).resolve().parents[1] / "tests" / "conformance" / "check_model.py"


def fetch_tests(folder: Path) -> None:
    """Put the tests of the installed transformers into the folder, as the package `transformers_tests`."""
    package, pip = folder / "transformers_tests", [sys.executable, "-m", "pip", "--quiet"]
    wanted = f"transformers=={version('transformers')}"
    options = ["--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
    subprocess.run([*pip, "download", *options, wanted], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), "parameterized"], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as source:
        source.extractall(folder, filter="data")
    next(folder.glob("transformers-*/tests")).replace(package)
    for name, mixin in ABSENT.items():
        (package / name).parent.mkdir()
        (package / name).write_text(f"class {mixin}:\n    pass\n")


def main() -> None:
    """Fetch what is missing, run the tests, and end as they do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "scgpt_hf"
    parser.add_argument("--cache", type=Path, default=cache, help="where to unpack them (default: %(default)s)")
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
