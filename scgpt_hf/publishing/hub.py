"""Publishes a run on the Hub: what goes up, in one commit, and what to do when the Hub refuses.

Only what is listed here leaves the machine: weights, processor and code as safetensors, JSON and Python, and the run's
record without local paths and tokens. Pickles and optimiser states stay. `card*.py` write the card.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from scgpt_hf.publishing.card import LOCAL_CHECKPOINT, model_card, name_checkpoint
from scgpt_hf.publishing.card_finetuned import finetuned_card
from scgpt_hf.publishing.record import Record

logger = logging.getLogger(__name__)

MODEL_TYPE = "scgpt"
_INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_JSON = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", _INDEX}
# httpx's HTTPError, or httpx2's: which of them depends on the version of huggingface_hub.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]


class HubError(OSError):
    """The Hub did not take a run; the message says why and what to do."""


def check_repository(
    repo_id: str | None, *, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> None:
    """Raise unless a run can be published there; to be asked before it is trained. Arguments as of `publish`.

    A repository that does not exist is made, as the only sure way to know that it can be.

    Raises:
        ValueError: no id, or a malformed one.
        HubError: the Hub cannot be reached, or would not take the run.
    """
    if repo_id is None:
        raise ValueError("push_to_hub needs to know where to; give --hub_model_id OWNER/NAME")
    require_repo_id(repo_id)
    api = HfApi(token=token)
    with plain_words(repo_id, api.endpoint):
        _claim(api, repo_id, private, revision)


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    weights: str = LOCAL_CHECKPOINT,
) -> str:
    """Put a run on the Hub, in one commit, and return its address.

    Doing it again changes only what changed; after an interruption only what is missing is sent.

    Args:
        run: the run folder.
        repo_id: ORGANISATION/NAME; made if it does not exist.
        private: whether a new repository is private; by default as its owner has set.
        token: that may write there; the one of `hf auth login` when not given.
        revision: branch to put it on, made from main if it does not exist; main when not given.
        weights: folder within the run that holds model and processor, e.g. checkpoint-500 while training goes on.

    Raises:
        ValueError: the id is malformed, the run is not complete, or one of its files is malformed.
        HubError: the Hub refuses, cannot be reached, or holds something else under this id.
    """
    run = Path(run)
    require_repo_id(repo_id)
    files = collect_files(run, repo_id, weights)
    api = HfApi(token=token)
    with plain_words(repo_id, api.endpoint):
        found = _claim(api, repo_id, private, revision)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in _stale_weights(found, files)]
        api.create_commit(repo_id, operations, commit_message=f"Publish {run.resolve().name}", revision=revision)
    address = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    logger.info("published %d files of %s at %s", len(files), run, address)
    return address


def _claim(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> ModelInfo:
    """Return what is in the repository, made if it does not exist, after checking that a run may be put there."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.auth_check(repo_id, write=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    found = api.model_info(repo_id, revision=revision)
    _require_ours(found, private)
    return found


def collect_files(run: Path, repo_id: str, weights: str = LOCAL_CHECKPOINT) -> dict[str, Path | bytes]:
    """Return what is published of a run, by name in the repository: the file as it is, or the bytes sent instead.

    Raises:
        ValueError: model or processor are not complete or do not belong together, or a file is malformed.
    """
    folder = run / weights
    for path in [path for place in (run, folder) if place.is_dir() for path in sorted(place.iterdir())]:
        if path.is_file() and path.is_symlink():
            raise ValueError(f"{path} is a link, and what it leads to may not be meant for others; put a copy there")
    _require_complete(folder)
    check_pair(folder)
    listed = [path for path in sorted(folder.iterdir()) if path.suffix in {".safetensors", ".py"} or path.name in _JSON]
    files: dict[str, Path | bytes] = {path.name: path for path in listed}
    files |= {path.name: path for path in (run / "loss.png", run / "umap.png") if path.is_file()}
    if (run / "metrics.jsonl").is_file():
        files["metrics.jsonl"] = (run / "metrics.jsonl").read_bytes()  # read once: it grows while training goes on
    if (run / "settings.yaml").is_file():
        files["settings.yaml"] = yaml.safe_dump(Record(run / "settings.yaml").content, sort_keys=False).encode()
    if (run / "split.json").is_file():
        files["split.json"] = json.dumps(Record(run / "split.json").content).encode()
    files["README.md"] = _readme(run, repo_id, weights).encode()
    return files


def _readme(run: Path, repo_id: str, weights: str) -> str:
    """Return the run's README if somebody wrote their own words into it, else the card for this repository."""
    written = run / "README.md"
    if written.is_file() and (text := written.read_text(encoding="utf-8")) != str(_card(run)):
        return name_checkpoint(text, repo_id)
    return str(_card(run, repo_id, weights))


def _card(run: Path, repo_id: str | None = None, weights: str = LOCAL_CHECKPOINT) -> ModelCard:
    if Record(run / "summary.json").get("task", str):
        return finetuned_card(run, repo_id)
    return model_card(run, repo_id, weights)


def require_repo_id(repo_id: str) -> None:
    """Raise a ValueError unless this is OWNER/NAME."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"expected a repository id like 'my-lab/blood-300k', found {repo_id!r}: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"expected a repository id with its owner, like 'my-lab/{repo_id}', found {repo_id!r}")


def _require_complete(folder: Path) -> None:
    """Raise unless a stranger can load model and processor from the folder."""
    needed = {"config.json", "processor_config.json", "tokenizer.json"}
    index = Record(folder / _INDEX).get("weight_map", dict)
    needed |= set(map(str, index.values())) if index else {"model.safetensors"}
    for name in ("config.json", "processor_config.json"):
        classes = Record(folder / name).get("auto_map", dict) or {}
        needed |= {f"{str(reference).split('.')[0]}.py" for reference in classes.values()}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise ValueError(
            f"{folder} is not complete, it lacks {', '.join(missing)}; publish a run that has ended, "
            "or save model and processor there by save_pretrained"
        )


def check_pair(folder: Path) -> None:
    """Raise unless the weights in a folder know exactly the genes of the processor beside them.

    Raises:
        ValueError: they have another number of rows than the vocabulary has entries.
    """
    n_rows = Record(folder / "config.json").get("vocab_size", int)
    tokenizer = Record(folder / "tokenizer.json")
    added = [entry for entry in tokenizer.get("added_tokens", list) or [] if isinstance(entry, dict)]
    entries = [*(tokenizer.get("model.vocab", dict) or {}).values(), *(entry.get("id") for entry in added)]
    ids = {entry for entry in entries if isinstance(entry, int)}
    if n_rows is not None and len(ids) != n_rows:
        raise ValueError(
            f"the model in {folder} was made for a vocabulary of {n_rows:,}, its tokenizer.json has {len(ids):,}; "
            "put the processor there that the model was trained with"
        )


def _require_ours(found: ModelInfo, private: bool | None) -> None:
    """Raise where publishing would bury another model, or show what should be private."""
    model_type = (found.config or {}).get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise HubError(f"{found.id} already holds a model of type {model_type!r}; choose another name")
    if private and not found.private:
        raise HubError(
            f"asked for a private repository, but {found.id} exists and is public; make it private in its settings, "
            "or choose another name"
        )


def _stale_weights(found: ModelInfo, files: dict[str, Any]) -> list[str]:
    """Return weights of an earlier model: beside a new sharded one, an old single file would be loaded in its place."""
    there = [sibling.rfilename for sibling in found.siblings or []]
    return [name for name in there if "/" not in name and name.endswith(_WEIGHT_SUFFIXES) and name not in files]


@contextmanager
def plain_words(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn what the client raises into one sentence that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError("the Hub cannot be reached because HF_HUB_OFFLINE is set; unset it") from error
    except json.JSONDecodeError as error:
        raise HubError(f"{endpoint} does not answer like the Hub; try again later, or check HF_ENDPOINT") from error
    except (_HttpError, OSError, RuntimeError) as error:
        cause: BaseException | None = error
        # An upload that fails comes wrapped in a RuntimeError.
        while cause is not None and not isinstance(cause, (_HttpError, ConnectionError, TimeoutError)):
            cause = cause.__cause__
        if cause is None or isinstance(error, HubError):
            raise
        if not isinstance(cause, HfHubHTTPError):
            raise HubError(
                f"the connection to {endpoint} failed ({type(cause).__name__}); check the network and run the same "
                "again: files that arrived are kept, and only the rest is sent"
            ) from error
        raise HubError(_advice(cause, repo_id)) from error


def _advice(error: HfHubHTTPError, repo_id: str) -> str:
    status, owner = error.response.status_code, repo_id.split("/")[0]
    if status >= 500:
        return f"the Hub fails ({status}); run the same again later: files that arrived are kept"
    advice = {
        401: "the Hub does not know you (401); run `hf auth login`, or pass a token that may write",
        403: f"you may not write to {repo_id} (403); use a token that may write for {owner}, or choose your own name",
        404: f"the Hub has no {repo_id} that you may see, or no such revision (404); check both, and your token",
        409: f"{repo_id} is taken or being changed by somebody else (409); run the same again, or choose another name",
        412: f"{repo_id} was changed by somebody else meanwhile (412); run the same again",
        429: "the Hub asks for patience, too many requests (429); run the same again in some minutes",
    }
    said = error.server_message or str(error).splitlines()[0]
    return advice.get(status, f"the Hub refuses {repo_id} ({status}): {said}")
