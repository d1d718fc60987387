"""Tests of `scripts/pretrain.py --push_to_hub`: checkpoints during training, the finished run, and failures.

The script runs in a process whose `huggingface_hub` client talks to the local Hub of `tests/support/hub_server.py`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.hub_run import Finished, run_script
from tests.support.hub_server import Client, Hub, client_environment

SCRIPT = ROOT / "scripts" / "pretrain.py"
SMALL = [
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "16"),
    *("--min_gene_counts", "1", "--validation_fraction", "0.3", "--num_train_epochs", "2", "--logging_steps", "4"),
    *("--per_device_train_batch_size", "32", "--disable_tqdm", "true", "--use_cpu", "true"),
]
TOKEN = "hf_owner"


def pretrain(client: Client, census: Path, folder: Path, repo_id: str, *flags: str, token: str = TOKEN) -> Finished:
    """Train a tiny model that pushes to the repository."""
    arguments = ["--data", str(census), "--output_dir", str(folder), *SMALL, "--push_to_hub", "--hub_model_id", repo_id]
    return client(run_script, SCRIPT, [*arguments, *flags], token)


@pytest.fixture(scope="module")
def pushed(client: Client, small_census: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a run that was pushed to org/pushed, and its output."""
    folder = tmp_path_factory.mktemp("runs") / "pushed"
    done = pretrain(client, small_census, folder, "org/pushed", "--hub_token", TOKEN, token="")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_run_is_pushed_during_training_and_at_its_end(hub: Hub, pushed: tuple[Path, str]) -> None:
    folder, output = pushed
    assert output.splitlines()[-1] == f"Published at {hub.url}/org/pushed"
    first, *_, last = list(hub.state.repositories["models/org/pushed"].commits.values())[1:]
    assert {"model.safetensors", "processor_config.json", "modeling_scgpt.py", "split.json", "README.md"} <= set(first)
    assert not {"loss.png", "umap.png"} & set(first)
    assert {"loss.png", "umap.png"} <= set(last)
    assert last["model.safetensors"] == (folder / "best_model" / "model.safetensors").read_bytes()


def test_pushed_card_is_ours(hub: Hub, pushed: tuple[Path, str]) -> None:
    pushes = list(hub.state.repositories["models/org/pushed"].commits.values())[1:]
    assert "not recorded" not in pushes[0]["README.md"].decode()
    assert [b"**Training is in progress.**" in files["README.md"] for files in pushes[:: len(pushes) - 1]] == [
        True,
        False,
    ]
    for files in pushes:
        card = files["README.md"].decode()
        assert card.startswith("---\n")
        assert "# pushed\n" in card
        assert 'from_pretrained("org/pushed"' in card
        assert "held-out donors" in card
    assert "![loss.png](loss.png)" in card
    assert "generated automatically" not in card


def test_no_local_path_or_token_is_pushed(hub: Hub, pushed: tuple[Path, str], small_census: Path) -> None:
    for files in hub.state.repositories["models/org/pushed"].commits.values():
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl")) or "trainer_state" in name]
        for name, content in files.items():
            for private in (TOKEN, str(small_census.parent), str(pushed[0].parent), "file://"):
                assert private.encode() not in content, (name, private)
            if name.endswith((".md", ".json", ".jsonl", ".yaml")):
                found = re.findall(r"""(?<=["' ])/(?:home|tmp|root|work|Users|private|var)/\S*""", content.decode())
                assert not found, name


LOAD = """
import sys
sys.modules |= dict.fromkeys(("scgpt_hf", "numba"))  # as if they were not installed
import json, torch
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor, AutoTokenizer
AutoTokenizer.from_pretrained("org/pushed", trust_remote_code=False)
processor = AutoProcessor.from_pretrained("org/pushed", trust_remote_code=True)
for auto in (AutoModel, AutoModelForPreTraining):
    model, report = auto.from_pretrained("org/pushed", trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
genes = processor.tokenizer.convert_ids_to_tokens(range(20))
batch = processor(torch.ones(3, 20).numpy(), genes)
print(json.dumps(list(model.eval()(**batch).cell_embedding.shape)))
"""


def test_pushed_model_loads_without_this_package(hub: Hub, pushed: tuple[Path, str], tmp_path: Path) -> None:
    environment = os.environ | client_environment(hub, tmp_path / "hf_home")
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [3, 16]


def test_run_does_not_train_if_it_cannot_be_pushed(client: Client, small_census: Path, tmp_path: Path) -> None:
    done = pretrain(client, small_census, tmp_path / "run", "org/untrained", token="hf_stranger")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("pretrain.py: no write access to org/untrained (403)")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_failed_pushes_are_reported_and_leave_the_run_complete(
    hub: Hub, client: Client, small_census: Path, tmp_path: Path
) -> None:
    with hub.fault("/commit/", status=403, times=99):
        done = pretrain(client, small_census, tmp_path / "run", "org/lost", "--num_train_epochs", "1")
    assert done.stderr.count("no write access to org/lost (403)") > 1  # a warning for a checkpoint, and the final error
    assert done.returncode != 0
    assert "no write access to org/lost (403)" in done.stderr.splitlines()[-1]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"best_model", "summary.json", "README.md", "loss.png", "umap.png", "split.json", "settings.yaml"} <= names
