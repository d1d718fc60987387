"""Native Windows: the model loads; what needs POSIX is refused in one sentence."""

import subprocess
import sys

from tests.support import ROOT

# Everything that the standard library and torch decide by the platform is decided before the name is changed.
WINDOWS = "import os, scgpt_hf; os.name = 'nt'; "
MODEL_LIBRARIES = "import torch, transformers.modeling_utils; "
SENTENCE = "scgpt_hf reads cells and trains on Linux and macOS, not on native Windows; run it in WSL 2 (wsl --install)"


def run(code: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", before + WINDOWS + code], capture_output=True, text=True, cwd=ROOT)


def test_what_needs_posix_is_refused_at_import() -> None:
    done = run("scgpt_hf.open_source")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {SENTENCE}"


def test_a_command_prints_one_sentence() -> None:
    done = run("import scgpt_hf.cli.pretrain")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", SENTENCE + "\n")


def test_the_model_and_the_conversion_of_checkpoints_do_not_need_posix() -> None:
    done = run(
        "print(scgpt_hf.ScGPTModel, scgpt_hf.ScGPTProcessor, scgpt_hf.load_model, scgpt_hf.convert_scgpt)",
        MODEL_LIBRARIES,
    )
    assert done.returncode == 0, done.stderr
