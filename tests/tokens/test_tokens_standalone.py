"""A saved processor loads without this package, from its own files, with and without numba, in a new process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

GENES = [f"ENSG{i:011d}" for i in range(50)]

# Runs without scgpt_hf and, if requested, without numba; writes the processor's batch for counts.npy.
SCRIPT = """
import sys
for name in sys.argv[2:]:
    sys.modules[name] = None
import numpy as np
from transformers import AutoProcessor, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
assert type(tokenizer).__module__.startswith("transformers."), type(tokenizer)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
genes = [f"ENSG{i:011d}" for i in range(50)]
assert tokenizer.convert_tokens_to_ids(genes) == list(range(50))
batch = processor(np.load(folder + "/counts.npy"), genes, mask_ratios=(0.25, 0.75))
np.savez(folder + "/batch.npz", **{key: tensor.numpy() for key, tensor in batch.items()})
processor.save_pretrained(folder + "/again")
"""


def _run(folder: Path, *absent: str, **environment: str) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    command = [sys.executable, "-c", SCRIPT, str(folder), *absent]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("absent", [("scgpt_hf",), ("scgpt_hf", "numba")])
def test_a_saved_processor_loads_without_the_package(tmp_path: Path, absent: tuple[str, ...]) -> None:
    processor = ScGPTProcessor.from_genes(GENES, max_tokens=20)
    folder = tmp_path / "saved"
    processor.save_pretrained(folder)
    counts = np.random.default_rng(0).poisson(1.5, (30, 50))
    np.save(folder / "counts.npy", counts)
    _run(folder, *absent, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    expected: dict[str, Any] = processor(counts, GENES, mask_ratios=(0.25, 0.75))
    with np.load(folder / "batch.npz") as batch:
        assert set(batch) == set(expected)
        for key in batch:
            np.testing.assert_array_equal(batch[key], expected[key].numpy())
    code = {path.name for path in folder.glob("*.py")}
    assert {path.name for path in (folder / "again").glob("*.py")} == code
    saved, again = (json.loads((at / "processor_config.json").read_text()) for at in (folder, folder / "again"))
    assert saved == again


@pytest.mark.parametrize("temporary", [True, False])
def test_kernels_compile_without_a_writable_folder(tmp_path: Path, temporary: bool) -> None:
    source = Path(sys.modules[ScGPTProcessor.__module__].__file__ or "").parent
    package = tmp_path / "copied"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").write_text("a file where numba expects a folder")
    code = """
import os
import numpy as np
from copied.sampling_scgpt import COMPILED, random_word
assert COMPILED
assert random_word(np.uint64(1234567), 0) == 6457827717110365317
print(type(random_word._cache).__name__, random_word._cache.cache_path)
"""
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    folder = tmp_path / f"scgpt_hf-numba-{os.getuid()}"
    if not temporary:
        folder.write_text("a file that is in the way")
    variables = os.environ | {"HOME": str(no_folder), "XDG_CACHE_HOME": str(no_folder), "NUMBA_CACHE_DIR": ""}
    command = [sys.executable, "-c", code]
    variables["TMPDIR"] = str(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kind, path = done.stdout.split()
    assert (kind == "NullCache", path.startswith(str(folder))) == (not temporary, temporary)
