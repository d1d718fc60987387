"""Tests of publishing a run: the published files, publishing again, interruptions, and errors of the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scgpt_hf.publishing.card import model_card
from scgpt_hf.publishing.hub import HubError
from scgpt_hf.publishing.publish_run import check_repository, check_vocabulary_size, publish
from tests.support.hub_run import FILES_OF_A_MODEL, RECORD, SECRET
from tests.support.hub_server import Client, Hub


def commits(hub: Hub, repo_id: str) -> int:
    return len(hub.state.repositories[f"models/{repo_id}"].commits)


def sent_since(hub: Hub, start: int, what: str = "PUT /lfs") -> list[str]:
    return [request for request in hub.requests[start:] if what in request]


def test_publish_sends_model_and_record_only(hub: Hub, client: Client, run: Path) -> None:
    address = client(publish, run, "org/all", token="hf_owner")
    assert address == f"{hub.url}/org/all"
    files = hub.files("org/all")
    assert set(files) == {*FILES_OF_A_MODEL, *RECORD, ".gitattributes"}
    assert files["model.safetensors"].decode() == FILES_OF_A_MODEL["model.safetensors"]
    assert not any(
        word in content for content in files.values() for word in (SECRET.encode(), str(run.parent).encode())
    )
    assert yaml.safe_load(files["settings.yaml"])["data"] == {"data": ["cells.h5ad"], "cls_value": 0.0}
    assert json.loads(files["split.json"])["parts"]["train"]["donors"] == ["a", "b"]
    assert b'from_pretrained("org/all"' in files["README.md"]
    assert b"# all\n" in files["README.md"]


def test_publish_again_changes_nothing_and_sends_nothing(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/again", token="hf_owner")
    start = len(hub.requests)
    client(publish, run, "org/again", token="hf_owner")
    assert commits(hub, "org/again") == 2
    assert not sent_since(hub, start, "PUT")
    assert not sent_since(hub, start, "/commit/")


def test_publish_puts_the_repository_into_an_unedited_card(hub: Hub, client: Client, run: Path) -> None:
    model_card(run).save(run / "README.md")
    client(publish, run, "org/card", token="hf_owner")
    assert hub.files("org/card")["README.md"].decode() == str(model_card(run, "org/card"))


def test_publish_keeps_an_edited_readme(hub: Hub, client: Client, run: Path) -> None:
    (run / "README.md").write_text('---\nlicense: mit\n---\nOurs. `AutoModel.from_pretrained("best_model")`\n')
    client(publish, run, "org/words", token="hf_owner")
    readme = hub.files("org/words")["README.md"].decode()
    assert readme == '---\nlicense: mit\n---\nOurs. `AutoModel.from_pretrained("org/words")`\n'


def test_publish_of_a_fine_tuned_run_sends_its_own_card(hub: Hub, client: Client, run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"task": "annotate", "labels_key": "cell_type"}))
    (run / "settings.yaml").write_text(yaml.safe_dump({"model": str(run / "best_model"), "learning_rate": 1e-3}))
    client(publish, run, "org/types", token="hf_owner")
    card = hub.files("org/types")["README.md"].decode()
    assert "It predicts `cell_type`" in card
    assert 'from_pretrained("org/types"' in card


def test_publish_removes_stale_weights(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/shards", token="hf_owner")
    shards = {f"model-0000{number}-of-00002.safetensors": f"shard {number}" for number in (1, 2)}
    (run / "best_model" / "model.safetensors").unlink()
    for name, content in shards.items():
        (run / "best_model" / name).write_text(content)
    index = {"weight_map": dict(zip(("a", "b"), shards, strict=True))}
    (run / "best_model" / "model.safetensors.index.json").write_text(json.dumps(index))
    client(publish, run, "org/shards", token="hf_owner")
    weights = {name for name in hub.files("org/shards") if "safetensors" in name}
    assert weights == {*shards, "model.safetensors.index.json"}


def test_publish_of_a_checkpoint_leaves_out_the_training_state(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/checkpoint", token="hf_owner", weights="checkpoint-10")
    assert set(hub.files("org/checkpoint")) == {*FILES_OF_A_MODEL, *RECORD, ".gitattributes"}


def download(repo_id: str, **keywords: Any) -> dict[str, str]:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo_id, **keywords))
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_revision_does_not_change_main(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/revisions", token="hf_owner")
    first = hub.state.repositories["models/org/revisions"].branches["main"]
    (run / "best_model" / "model.safetensors").write_text("second")
    address = client(publish, run, "org/revisions", token="hf_owner", revision="v2")
    assert address.endswith("/org/revisions/tree/v2")
    assert client(download, "org/revisions", revision="v2")["model.safetensors"] == "second"
    for revision in ("main", first):
        weights = client(download, "org/revisions", revision=revision)["model.safetensors"]
        assert weights == FILES_OF_A_MODEL["model.safetensors"]


def test_download_continues_after_a_dropped_connection(hub: Hub, client: Client, run: Path) -> None:
    (run / "best_model" / "model.safetensors").write_text("downloaded weights" * 50)
    client(publish, run, "org/download", token="hf_owner")
    with hub.fault("GET /org/download/resolve/", after_bytes=100) as fault:
        found = client(download, "org/download", allow_patterns="*.safetensors")
    assert fault.times == 0
    assert found["model.safetensors"] == "downloaded weights" * 50


def error_of_download(repo_id: str, **keywords: Any) -> str:
    """Return the type of the error that a download raises, or 'nothing'."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        download(repo_id, **keywords)
    except HfHubHTTPError as error:
        return type(error).__name__
    return "nothing"


def test_private_repository_is_visible_to_its_owner_only(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/private", token="hf_owner", private=True)
    for token in (False, "hf_stranger"):
        assert client(error_of_download, "org/private", token=token) == "RepositoryNotFoundError"
    assert client(download, "org/private", token="hf_owner")


def test_upload_continues_after_a_dropped_connection(hub: Hub, client: Client, run: Path) -> None:
    (run / "best_model" / "model.safetensors").write_text("weights of its own" * 50)
    start = len(hub.requests)
    with hub.fault("PUT /lfs", after_bytes=100) as fault:
        client(publish, run, "org/dropped", token="hf_owner")
    assert fault.times == 0
    assert hub.files("org/dropped")["model.safetensors"] == b"weights of its own" * 50
    assert len(sent_since(hub, start)) == 2


def test_an_upload_goes_on_after_an_error_of_the_server(hub: Hub, client: Client, run: Path) -> None:
    with hub.fault("/preupload/", status=502) as fault:
        client(publish, run, "org/retried", token="hf_owner")
    assert fault.times == 0
    assert "model.safetensors" in hub.files("org/retried")


def test_publish_after_an_interruption_sends_only_the_rest(hub: Hub, client: Client, run: Path) -> None:
    (run / "best_model" / "model.safetensors").write_text("new weights" * 50)
    with hub.fault("/commit/", after_bytes=0), pytest.raises(HubError, match="run the same command again"):
        client(publish, run, "org/broken", token="hf_owner")
    assert set(hub.files("org/broken")) == {".gitattributes"}
    start = len(hub.requests)
    client(publish, run, "org/broken", token="hf_owner")
    assert not sent_since(hub, start)
    assert hub.files("org/broken")["model.safetensors"] == b"new weights" * 50


@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/", "validate-yaml"])
def test_server_error_says_to_try_later(hub: Hub, client: Client, run: Path, place: str) -> None:
    with (
        hub.fault(place, status=500, times=9),
        pytest.raises(HubError, match="status 500"),
    ):
        client(publish, run, f"org/errors-{place.strip('/').split('/')[-1]}", token="hf_owner")


def test_dropped_connection_names_the_hub(hub: Hub, client: Client, run: Path) -> None:
    with hub.fault("/api/repos/create"), pytest.raises(HubError, match=f"connection to {hub.url} failed"):
        client(publish, run, "org/unreachable", token="hf_owner")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, r"\(401\); run `hf auth login`"),
        ("hf_wrong", r"\(401\)"),
        ("hf_stranger", r"no write access to org/.* \(403\); use a token with write access to org,"),
    ],
)
def test_token_without_write_access_raises(
    hub: Hub, client: Client, run: Path, token: str | None, expected: str
) -> None:
    with pytest.raises(HubError, match=expected):
        client(publish, run, "org/forbidden", token=token)
    client(publish, run, "org/taken", token="hf_owner")
    with pytest.raises(HubError, match=expected):
        client(publish, run, "org/taken", token=token)


@pytest.mark.parametrize(("status", "expected"), [(409, "409"), (412, "412"), (418, "418")])
def test_rejected_commit_raises_with_status(hub: Hub, client: Client, run: Path, status: int, expected: str) -> None:
    with hub.fault("/commit/", status=status), pytest.raises(HubError, match=expected):
        client(publish, run, f"org/refused-{status}", token="hf_owner")


def test_invalid_revision_raises(hub: Hub, client: Client, run: Path) -> None:
    with hub.fault("/revision/", status=404), pytest.raises(HubError, match="no such revision"):
        client(publish, run, "org/revision", token="hf_owner", revision="v1")


def test_publish_does_not_replace_another_type_of_model(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/bert", token="hf_owner")
    hub.files("org/bert")["config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(HubError, match=r"org/bert .*'bert'"):
        client(publish, run, "org/bert", token="hf_owner")


def test_private_raises_if_the_repository_is_public(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/public", token="hf_owner")
    with pytest.raises(HubError, match="org/public exists and is public"):
        client(publish, run, "org/public", token="hf_owner", private=True)


def test_check_repository_creates_it_and_tests_write_access(hub: Hub, client: Client) -> None:
    client(check_repository, "org/checked", token="hf_owner", private=True, revision="v2")
    assert set(hub.files("org/checked", "v2")) == {".gitattributes"}
    assert hub.state.repositories["models/org/checked"].private
    client(check_repository, "org/checked", token="hf_owner")
    with pytest.raises(HubError, match="org/checked-too"):
        client(check_repository, "org/checked-too", token="hf_stranger")
    with pytest.raises(HubError, match="401"):
        client(check_repository, "org/checked-too", token=None)


def test_check_repository_raises_if_it_can_only_be_read(hub: Hub, client: Client, run: Path) -> None:
    client(publish, run, "org/theirs", token="hf_owner")
    with pytest.raises(HubError, match="org/theirs"):
        client(check_repository, "org/theirs", token="hf_stranger")


@pytest.mark.parametrize(
    ("repo_id", "expected"),
    [(None, "--hub_model_id"), ("name", "'my-lab/name'"), ("a b/c", "'a b/c'")],
)
def test_check_repository_raises_for_a_malformed_id(repo_id: str | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_repository(repo_id)


def test_model_and_processor_with_different_vocabularies_raise(run: Path) -> None:
    model = run / "best_model"
    vocabulary = {"model": {"vocab": {"ENSG1": 0, "<pad>": 1}}, "added_tokens": [{"id": 1}, {"id": 2}]}
    (model / "tokenizer.json").write_text(json.dumps(vocabulary))
    (model / "config.json").write_text(json.dumps({"vocab_size": 5}))
    with pytest.raises(ValueError, match=r"vocabulary of 5 entries.* 3;"):
        publish(run, "org/name")
    (model / "config.json").write_text(json.dumps({"vocab_size": 3}))
    check_vocabulary_size(model)


@pytest.mark.parametrize("repo_id", ["", "name", "org/name/more", "org/na me", "org/-name", "/name", "org/name.git"])
def test_malformed_id_raises_before_any_request(hub: Hub, run: Path, repo_id: str) -> None:
    start = len(hub.requests)
    with pytest.raises(ValueError, match="expected a repository id"):
        publish(run, repo_id)
    assert len(hub.requests) == start


@pytest.mark.parametrize(
    "lost", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors", "modeling_scgpt.py"]
)
def test_incomplete_model_raises_with_the_missing_file(run: Path, lost: str) -> None:
    (run / "best_model" / lost).unlink()
    with pytest.raises(ValueError, match=f"best_model is incomplete: missing {lost}"):
        publish(run, "org/name")


def test_run_without_a_model_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="best_model is incomplete"):
        publish(tmp_path, "org/name")


def test_offline_mode_raises(client: Client, run: Path) -> None:
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        client(publish_offline, run)


def publish_offline(run: Path) -> None:
    from huggingface_hub import constants, utils

    constants.HF_HUB_OFFLINE = True
    utils.close_session()
    try:
        publish(run, "org/offline", token="hf_owner")
    finally:
        constants.HF_HUB_OFFLINE = False
        utils.close_session()
