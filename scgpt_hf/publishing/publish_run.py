"""Publish a run as a model on the Hub, in one commit.

Only files listed here leave the machine: weights (safetensors), processor (JSON), code (Python), figures, and the
run's record without tokens and local paths. Pickles and the state of the optimizer stay. `card.py`,
`finetuned_card.py` and `perturbation_card.py` write the model card; `hub.py` explains errors of the Hub.
"""

import json
import logging
from collections.abc import Container
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo

from scgpt_hf.publishing.card import LOCAL_CHECKPOINT, model_card, name_checkpoint
from scgpt_hf.publishing.finetuned_card import finetuned_card
from scgpt_hf.publishing.hub import HubError, require_repo_id, translate_hub_errors
from scgpt_hf.publishing.perturbation_card import PERTURB, perturbation_card
from scgpt_hf.publishing.record import RunRecord

logger = logging.getLogger(__name__)

MODEL_TYPE = "scgpt"
_INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_JSON = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", _INDEX}


def check_repository(
    repo_id: str | None, *, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> None:
    """Check that a run can be published, before hours are spent on training it.

    Creates the repository if it does not exist: only that shows that it can be created.

    Args:
        repo_id: see `publish`; None raises.
        private: see `publish`.
        token: see `publish`.
        revision: see `publish`.

    Raises:
        ValueError: the id is missing or malformed.
        HubError: the Hub cannot be reached, or would not accept the run.
    """
    if repo_id is None:
        raise ValueError("push_to_hub needs the id of a repository; pass --hub_model_id OWNER/NAME")
    require_repo_id(repo_id)
    api = HfApi(token=token)
    with translate_hub_errors(repo_id, api.endpoint):
        _prepare_repository(api, repo_id, private, revision)


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    weights: str = LOCAL_CHECKPOINT,
) -> str:
    """Publish a run as a model on the Hub, in one commit, and return its address.

    Publishing again sends only what changed. After an interruption, only the missing files are sent.

    Args:
        run: the run folder.
        repo_id: ORGANISATION/NAME; created if it does not exist.
        private: whether a new repository is private; the owner's default when not given.
        token: token with write access; that of `hf auth login` when not given.
        revision: branch to publish on, created from main if it does not exist; main when not given.
        weights: folder inside the run with model and processor, e.g. checkpoint-500 while training is in progress.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the id is malformed, the run is incomplete, or one of its files is malformed.
        HubError: the Hub cannot be reached, rejects the upload, or holds another kind of model under this id.

    Example:
        >>> publish("runs/demo", "my-lab/demo", private=True)  # doctest: +SKIP
        'https://huggingface.co/my-lab/demo'
    """
    run = Path(run)
    require_repo_id(repo_id)
    files = collect_files(run, repo_id, weights)
    api = HfApi(token=token)
    with translate_hub_errors(repo_id, api.endpoint):
        repository = _prepare_repository(api, repo_id, private, revision)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in _stale_weights(repository, files)]
        api.create_commit(repo_id, operations, commit_message=f"Publish {run.resolve().name}", revision=revision)
    address = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    logger.info("published %d files of %s at %s", len(files), run, address)
    return address


def _prepare_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> ModelInfo:
    """Create the repository and branch if needed, check that the run may be put there, and return what it holds."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.auth_check(repo_id, write=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    repository = api.model_info(repo_id, revision=revision)
    _require_replaceable(repository, private)
    return repository


def collect_files(run: Path, repo_id: str, weights: str = LOCAL_CHECKPOINT) -> dict[str, Path | bytes]:
    """List the files to publish: name in the repository → local file, or the bytes to send in its place.

    Args:
        run: the run folder.
        repo_id: the card's code loads the model from there.
        weights: folder inside the run with model and processor.

    Raises:
        ValueError: model or processor are incomplete or do not match each other, a file is malformed, or one is a
            symbolic link.
    """
    folder = run / weights
    for path in [path for place in (run, folder) if place.is_dir() for path in sorted(place.iterdir())]:
        if path.is_file() and path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, whose target may be private; replace it with a copy")
    _require_complete(folder)
    check_vocabulary_size(folder)
    listed = [path for path in sorted(folder.iterdir()) if path.suffix in {".safetensors", ".py"} or path.name in _JSON]
    files: dict[str, Path | bytes] = {path.name: path for path in listed}
    files |= {path.name: path for path in (run / "loss.png", run / "umap.png") if path.is_file()}
    if (run / "metrics.jsonl").is_file():
        # Read it now: the client reads files twice, to hash and to send, and training may append in between.
        files["metrics.jsonl"] = (run / "metrics.jsonl").read_bytes()
    if (run / "settings.yaml").is_file():
        files["settings.yaml"] = yaml.safe_dump(RunRecord.read(run / "settings.yaml").content, sort_keys=False).encode()
    if (run / "split.json").is_file():
        files["split.json"] = json.dumps(RunRecord.read(run / "split.json").content).encode()
    files["README.md"] = _readme(run, repo_id, weights).encode()
    return files


def _readme(run: Path, repo_id: str, weights: str) -> str:
    """Return the card for the repository, or the run's README if a person has edited it."""
    local = run / "README.md"
    if local.is_file() and (text := local.read_text(encoding="utf-8")) != str(_card(run)):
        return name_checkpoint(text, repo_id)
    return str(_card(run, repo_id, weights))


def _card(run: Path, repo_id: str | None = None, weights: str = LOCAL_CHECKPOINT) -> ModelCard:
    task = RunRecord.read(run / "summary.json").get("task", str)
    if task == PERTURB:
        return perturbation_card(run, repo_id)
    if task:
        return finetuned_card(run, repo_id)
    return model_card(run, repo_id, weights)


def _require_complete(folder: Path) -> None:
    """Raise unless others can load model and processor from the folder."""
    needed = {"config.json", "processor_config.json", "tokenizer.json"}
    index = RunRecord.read(folder / _INDEX).get("weight_map", dict)
    needed |= set(map(str, index.values())) if index else {"model.safetensors"}
    for name in ("config.json", "processor_config.json"):
        classes = RunRecord.read(folder / name).get("auto_map", dict) or {}
        needed |= {f"{str(reference).split('.')[0]}.py" for reference in classes.values()}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise ValueError(
            f"{folder} is incomplete: missing {', '.join(missing)}; publish a run that has finished, or save model and "
            "processor there with save_pretrained"
        )


def check_vocabulary_size(folder: Path) -> None:
    """Check that the model in a folder has as many gene embeddings as the tokenizer has entries.

    Raises:
        ValueError: it has not, so model and processor are not from the same run.
    """
    n_embeddings = RunRecord.read(folder / "config.json").get("vocab_size", int)
    tokenizer = RunRecord.read(folder / "tokenizer.json")
    added = [entry for entry in tokenizer.get("added_tokens", list) or [] if isinstance(entry, dict)]
    entries = [*(tokenizer.get("model.vocab", dict) or {}).values(), *(entry.get("id") for entry in added)]
    ids = {entry for entry in entries if isinstance(entry, int)}  # added tokens can be in the vocabulary too
    if n_embeddings is not None and len(ids) != n_embeddings:
        raise ValueError(
            f"the model in {folder} has a vocabulary of {n_embeddings:,} entries, but its tokenizer.json has "
            f"{len(ids):,}; save the processor there that the model was trained with"
        )


def _require_replaceable(repository: ModelInfo, private: bool | None) -> None:
    """Raise if publishing would replace another kind of model, or show what should be private."""
    model_type = (repository.config or {}).get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise HubError(f"{repository.id} already holds a model of type {model_type!r}; choose another repository id")
    if private and not repository.private:
        raise HubError(
            f"requested a private repository, but {repository.id} exists and is public; make it private in its "
            "settings on the Hub, or choose another repository id"
        )


def _stale_weights(repository: ModelInfo, files: Container[str]) -> list[str]:
    """Return weight files of an earlier model: transformers prefers an old single file to new sharded ones."""
    published = [sibling.rfilename for sibling in repository.siblings or []]
    return [name for name in published if "/" not in name and name.endswith(_WEIGHT_SUFFIXES) and name not in files]
