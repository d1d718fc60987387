"""Test that the local Hub serves the `datasets` library."""

from tests.support.hub_server import Client, Hub

ROWS = {"gene": [[1, 5], [2], []], "count": [[3, 1], [7], []], "donor_id": ["a", "a", "b"]}


def push(repo_id: str) -> None:
    import datasets

    datasets.Dataset.from_dict(ROWS).push_to_hub(repo_id, token="hf_owner", private=True)


def stream_back(repo_id: str) -> list[dict[str, object]]:
    import datasets

    return list(datasets.load_dataset(repo_id, split="train", streaming=True, token="hf_owner"))


def test_dataset_is_pushed_and_streams_back(hub: Hub, client: Client) -> None:
    client(push, "org/cells")
    assert hub.state.repositories["datasets/org/cells"].private
    assert any(name.endswith(".parquet") for name in hub.files("org/cells", kind="datasets"))
    rows = client(stream_back, "org/cells")
    assert {name: [row[name] for row in rows] for name in ROWS} == ROWS
