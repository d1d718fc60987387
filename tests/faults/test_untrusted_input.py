"""Untrusted input: credentials stay out of files and logs, paths stay in their folder, and no foreign code runs."""

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from scgpt_hf.cells.selection.splits import load_split
from scgpt_hf.cells.source import open_source
from scgpt_hf.publishing.publish_run import collect_files
from scgpt_hf.training.settings_parsing import parse_settings, settings_yaml
from tests.support.damage import make_inputs, use_model

SECRETS = ("hf_plantedtoken", "plantedpassword")


@pytest.fixture(scope="module")
def inputs(small_cells, small_census, tmp_path_factory):
    return make_inputs(small_cells, small_census, tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs, tmp_path):
    return Path(shutil.copytree(inputs / "run", tmp_path / "run"))


def test_tokens_are_not_written_into_settings():
    settings = parse_settings(["--hub_token", SECRETS[0], "--hub_model_id", "my-lab/name"], "")
    assert settings.training.hub_token == SECRETS[0]
    assert SECRETS[0] not in settings_yaml(settings)


def test_an_address_with_a_password_raises_without_printing_it(tmp_path):
    with pytest.raises(ValueError, match="user name or password") as refused:
        open_source(f"s3://user:{SECRETS[1]}@bucket/census")
    assert SECRETS[1] not in str(refused.value)


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin"])
def test_pickles_are_never_loaded(run, tmp_path, name):
    witness, model = tmp_path / "executed", run / "best_model"
    (model / name).write_bytes(pickle.dumps(Malicious(witness)))
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
        with pytest.raises((OSError, ValueError), match="best_model"):
            use_model(model)
    else:
        use_model(model)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["processor_config.json", "config.json", "tokenizer_config.json"])
def test_code_next_to_weights_is_not_run(run, tmp_path, monkeypatch, name):
    """The library offers to run code of the folder if a file names an unknown class."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    witness, model = tmp_path / "executed", run / "best_model"
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(witness)!r})\nclass Evil: pass\n")
    content = json.loads((model / name).read_text()) | {"model_type": "evil", "processor_class": "Evil"}
    autos = ("AutoProcessor", "AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForPreTraining")
    content |= {"tokenizer_class": "Evil", "auto_map": dict.fromkeys(autos, "evil.Evil")}
    (model / name).write_text(json.dumps(content))
    with suppress(ValueError, OSError):
        use_model(model)
    assert not witness.exists()


def test_weights_outside_the_folder_are_not_read(run):
    model = run / "best_model"
    (model / "model.safetensors").rename(run / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"gene_encoder.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        use_model(model)


@pytest.mark.parametrize("name", ["config.json", "notes.json"])
def test_symbolic_links_are_not_published(run, tmp_path, name):
    secret = tmp_path / "secret.json"
    secret.write_text((run / "best_model" / "config.json").read_text())
    (run / "best_model" / name).unlink(missing_ok=True)
    (run / "best_model" / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name}.* is a symbolic link"):
        collect_files(run, "my-lab/name")


@pytest.mark.parametrize("repo_id", ["../../etc/x", "/etc/passwd", "a/../b", "my-lab/na\x00me", "https://x/y"])
def test_a_path_is_not_a_repository_id(run, repo_id):
    from scgpt_hf.publishing.publish_run import publish

    with pytest.raises(ValueError, match="expected a repository id"):
        publish(run, repo_id)


def test_paths_in_a_split_file_are_not_opened(run):
    split = json.loads((run / "split.json").read_text())
    split["source"]["uri"] = split["parts"]["train"]["donors"][0] = "../../../etc/passwd"
    (run / "split.json").write_text(json.dumps(split))
    assert load_split(run / "split.json").donors["train"][0] == "../../../etc/passwd"
    published = collect_files(run, "my-lab/name")["split.json"]
    assert b"etc" not in published
