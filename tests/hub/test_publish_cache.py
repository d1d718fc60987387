"""Tests of publishing a cache as a dataset, streaming it back, and opening it after a download."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.jobs.records import ShardError
from scgpt_hf.cells.source import open_source
from scgpt_hf.publishing.hub import HubError
from scgpt_hf.publishing.publish_cache import cache_card, check_dataset, publish_cache
from tests.support.hub_server import Client, Hub

TOKEN = "hf_owner"


@pytest.fixture(scope="module")
def folder(small_census: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "blood"
    write_cache(open_source(small_census, obs_filter="disease == 'normal'"), folder)
    return folder


def stream_back(repo_id: str) -> list[dict[str, object]]:
    import datasets

    return list(datasets.load_dataset(repo_id, split="train", streaming=True, token=TOKEN))


def read_back(address: str, cell_ids: np.ndarray) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        return open_source(address).read(cell_ids).counts.toarray()


@pytest.fixture(scope="module")
def published(client: Client, folder: Path) -> str:
    return client(publish_cache, folder, "org/blood", private=True, token=TOKEN)


def test_a_published_cache_streams_back(hub: Hub, client: Client, published: str, folder: Path) -> None:
    assert published == f"{hub.url}/datasets/org/blood"
    assert hub.state.repositories["datasets/org/blood"].private
    source, rows = open_source(folder), client(stream_back, "org/blood")
    assert [row["cell_id"] for row in rows] == source.obs().index.tolist()
    block = source.read(np.array([rows[7]["cell_id"]]), ["donor_id"])
    assert rows[7]["gene"] == block.counts.indices.tolist()
    assert rows[7]["count"] == block.counts.data.tolist()
    assert rows[7]["donor_id"] == block.obs["donor_id"].iloc[0]


def test_downloaded_cache_opens_as_a_source(client: Client, published: str, folder: Path) -> None:
    cell_ids = open_source(folder).obs().index.to_numpy()[::-2]
    for address in ("hf://datasets/org/blood", "hf://datasets/org/blood@main"):
        assert (client(read_back, address, cell_ids) == open_source(folder).read(cell_ids).counts.toarray()).all()


def presence_of(address: str, cell_ids: np.ndarray) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        presence = open_source(address).presence(cell_ids)
        assert presence is not None
        return presence.measured[presence.dataset_of_cell]


def test_a_downloaded_cache_knows_which_genes_were_measured(client: Client, published: str, small_census: Path) -> None:
    cell_ids = open_source(small_census, obs_filter="disease == 'normal'").obs().index.to_numpy()
    measured = client(presence_of, "hf://datasets/org/blood", cell_ids)
    assert (measured == presence_of(str(small_census), cell_ids)).all()
    assert not measured.all()


def run_code(code: str) -> dict[str, object]:
    """Run the code of a card, and return the variables it defines."""
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        exec(code, names)
    return {name: names[name] for name in ("names", "counts", "block") if name in names}


def test_the_code_of_the_card_gives_names_and_counts(hub: Hub, client: Client, published: str, folder: Path) -> None:
    streamed, opened = re.findall(
        r"```python\n(.*?)```", hub.files("org/blood", kind="datasets")["README.md"].decode(), re.DOTALL
    )
    source = open_source(folder)
    first = source.read(source.obs().index.to_numpy()[:1]).counts
    found = client(run_code, streamed)
    assert found["names"].tolist() == source.genes.feature_id.iloc[first.indices].tolist()
    assert found["counts"] == first.data.tolist()
    assert (client(run_code, opened)["block"].counts[:1] != first).nnz == 0


def fail_to_open(address: str, offline: bool = False) -> str:
    """Return the type and the message of the error."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        try:
            open_source(address)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def test_missing_private_and_other_datasets_raise_on_opening(hub: Hub, client: Client, folder: Path) -> None:
    client(push_other, "org/no-cache")
    client(publish_cache, folder, "org/closed", private=True, token=TOKEN)
    for address, offline, message in (
        ("hf://datasets/org/none", False, "FileNotFoundError: .*org/none"),
        ("hf://datasets/org/closed", False, "FileNotFoundError: .*org/closed.*hf auth login"),
        ("hf://datasets/org/no-cache@v2", False, "FileNotFoundError: .*org/no-cache@v2"),
        ("hf://datasets/org/no-cache", False, "ValueError: .*org/no-cache.*manifest.json"),
        ("hf://datasets/org/absent", True, "ConnectionError: .*org/absent.*HF_HUB_OFFLINE"),
        ("hf://org/blood", False, "ValueError: .*hf://org/blood"),
        ("hf://datasets/a b/c", False, "ValueError: .*hf://datasets/a b/c"),
    ):
        assert re.match(message, client(fail_to_open, address, offline)), address


def test_no_local_path_is_published(hub: Hub, published: str, small_census: Path) -> None:
    for name, content in hub.files("org/blood", kind="datasets").items():
        assert str(small_census.parent).encode() not in content, name
        assert b"file://" not in content, name


def test_card_states_size_filter_columns_and_code(hub: Hub, published: str, folder: Path) -> None:
    card = hub.files("org/blood", kind="datasets")["README.md"].decode()
    assert card.startswith("---\n")
    for text in (
        "data-*.arrow",
        "n<1K",
        "disease == 'normal'",
        "list of uint16",
        'load_dataset("org/blood"',
        "--data hf://datasets/org/blood",
        "license",
    ):
        assert text.lower() in card.lower(), text
    assert cache_card(folder, "org/blood").data.license == "other"


def change_census(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    content["source"]["census_version"] = "2025-11-08"
    manifest.write_text(json.dumps(content))


def test_card_of_census_cells_has_license_and_version(folder: Path, tmp_path: Path) -> None:
    change_census(Path(shutil.copytree(folder, tmp_path / "cache")) / "manifest.json")
    card = cache_card(tmp_path / "cache", "org/blood")
    assert card.data.license == "cc-by-4.0"
    assert "2025-11-08" in card.text


def test_publishing_again_replaces_the_shards(
    hub: Hub, client: Client, small_census: Path, tmp_path: Path, folder: Path
) -> None:
    client(publish_cache, folder, "org/again", token=TOKEN)
    hub.files("org/again", kind="datasets")["data-00000-of-00009.arrow"] = b"of an earlier cache"
    client(publish_cache, folder, "org/again", token=TOKEN)
    shards = [name for name in hub.files("org/again", kind="datasets") if name.endswith(".arrow")]
    assert shards == ["data-00000-of-00001.arrow"]


def corrupt(folder: Path) -> str:
    content = bytearray((folder / "data-00000-of-00001.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "data-00000-of-00001.arrow").write_bytes(content)
    return "org/corrupt"


@pytest.mark.parametrize(
    ("arrange", "error", "message"),
    [
        (corrupt, ShardError, "data-00000-of-00001.arrow is corrupt"),
        (lambda folder: (folder / "manifest.json").unlink() or "org/none", ShardError, "is not a cache"),
        (lambda folder: "blood", ValueError, "with its owner"),
        (lambda folder: "stranger/blood", HubError, "no write access to stranger/blood"),
    ],
)
def test_invalid_caches_ids_and_owners_raise(
    hub: Hub, client: Client, folder: Path, tmp_path: Path, arrange: Callable[[Path], str], error, message: str
) -> None:
    repo_id = arrange(Path(shutil.copytree(folder, tmp_path / "cache")))
    with pytest.raises(error, match=message):
        client(publish_cache, tmp_path / "cache", repo_id, token=TOKEN)
    assert f"datasets/{repo_id}" not in hub.state.repositories


def push_other(repo_id: str) -> None:
    import datasets

    datasets.Dataset.from_dict({"a": [1]}).push_to_hub(repo_id, token=TOKEN)


def test_another_dataset_or_a_public_one_is_left_alone(hub: Hub, client: Client, folder: Path) -> None:
    client(push_other, "org/other")
    with pytest.raises(HubError, match="org/other already holds a dataset"):
        client(check_dataset, "org/other", token=TOKEN)
    before = hub.files("org/other", kind="datasets")
    with pytest.raises(HubError, match="org/other already holds a dataset"):
        client(publish_cache, folder, "org/other", token=TOKEN)
    assert hub.files("org/other", kind="datasets") == before
    client(publish_cache, folder, "org/public", token=TOKEN)
    with pytest.raises(HubError, match="exists and is public"):
        client(publish_cache, folder, "org/public", private=True, token=TOKEN)


def test_publish_cache_after_an_interruption_sends_only_the_rest(hub: Hub, client: Client, folder: Path) -> None:
    with hub.fault("/commit/", after_bytes=0), pytest.raises(HubError, match="run the same command again"):
        client(publish_cache, folder, "org/broken", token=TOKEN)
    with (
        hub.fault("/commit/", status=500, times=9),
        pytest.raises(HubError, match="status 500"),
    ):
        client(publish_cache, folder, "org/broken", token=TOKEN)
    start = len(hub.requests)
    client(publish_cache, folder, "org/broken", token=TOKEN)
    assert not [request for request in hub.requests[start:] if "PUT /lfs" in request]
    rows = client(stream_back, "org/broken")
    assert [row["cell_id"] for row in rows] == open_source(folder).obs().index.tolist()


def test_download_of_a_cache_survives_dropped_connections_and_reports_failures(
    hub: Hub, client: Client, folder: Path
) -> None:
    client(publish_cache, folder, "org/dropped", token=TOKEN)
    with hub.fault("/resolve/", after_bytes=100, times=1) as fault:
        cell_ids = open_source(folder).obs().index.to_numpy()
        found = client(read_back, "hf://datasets/org/dropped", cell_ids)
    assert fault.times == 0
    assert (found == open_source(folder).read(cell_ids).counts.toarray()).all()
    client(publish_cache, folder, "org/failing", token=TOKEN)
    with hub.fault("/resolve/", status=500, times=99):
        error = client(fail_to_open, "hf://datasets/org/failing")
    assert error.startswith("ConnectionError: "), error
