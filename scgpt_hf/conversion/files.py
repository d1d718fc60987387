"""Read and check the three files of an original scGPT checkpoint: args.json, vocab.json and best_model.pt.

Each file is checked alone. `checkpoint.py` checks that they agree; `keys.py` interprets the keys of the weights.
"""

import json
import pickle
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scgpt_hf.file_kinds import describe_file
from scgpt_hf.tokens.vocabulary_scgpt import PAD, check_vocab

ARGS, VOCAB, WEIGHTS = "args.json", "vocab.json", "best_model.pt"
SAFETENSORS = ".safetensors"
# Parts of a key that name a wrapper around the model, or around a part of it: DataParallel and DistributedDataParallel,
# torch.compile, FSDP, and activation checkpointing. No key of scGPT has a part of such a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# Settings that args.json must contain.
_REQUIRED = ("embsize", "nheads", "d_hid", "nlayers", "n_bins")
# Settings that args.json may lack, with their values in the published checkpoints (scGPT_human and the others).
_PUBLISHED: dict[str, Any] = {
    **{"max_seq_len": 1200, "dropout": 0.2, "pad_value": -2, "mask_value": -1},
    **{"pad_token": PAD, "input_style": "binned"},
}
# Settings that are whole numbers, with the lowest value of each.
_MINIMUM = dict.fromkeys((*_REQUIRED, "n_layers_cls"), 1) | {"n_bins": 2, "max_seq_len": 2}
_LIMIT = 2**31  # numbers must be below it, which also excludes infinity and NaN
_NUMBERS = {"dropout", "pad_value", "mask_value"}
_CHOICES = {
    "pad_token": (PAD,),
    "input_style": ("binned", "log1p"),
    "input_emb_style": ("continuous", "category", "scaling"),
}
# Exceptions that torch.load raised on damaged files in our tests, apart from UnpicklingError.
_DAMAGED = (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError)


@dataclass(frozen=True)
class OriginalFiles:
    """The contents of the three files.

    Attributes:
        args: settings from args.json; those that it lacks have their published values.
        missing_args: names of the settings that args.json lacks.
        vocab: token → id.
        weights: original key → tensor on the CPU, without the prefixes of wrappers.
        wrappers: prefix of a wrapper that was removed → number of keys that had it.
        weights_path: path of the weights, for error messages.
    """

    args: dict[str, Any]
    missing_args: tuple[str, ...]
    vocab: dict[str, int]
    weights: dict[str, Tensor]
    wrappers: dict[str, int]
    weights_path: str


def read_original(folder: Path, weights_file: str) -> OriginalFiles:
    """Read and check the three files of a checkpoint.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a file is invalid; the message names the file and the key.
    """
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file; an original checkpoint is a folder with {ARGS}, {VOCAB} and the weights: pass "
            f"{folder.parent} and --weights_file {folder.name}"
        )
    weights_file = _find_weights(folder, weights_file)
    names = (ARGS, VOCAB, weights_file)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)} (found: {found}); a checkpoint of scGPT's code is a folder with "
            f"{', '.join(names)}{_advise(folder)}"
        )
    args, missing_args = read_args(folder / ARGS)
    path = folder / weights_file
    weights, wrappers = unwrap_keys(read_weights(path), str(path))
    return OriginalFiles(args, missing_args, read_vocab(folder / VOCAB), weights, wrappers, str(path))


def _find_weights(folder: Path, weights_file: str) -> str:
    """Return the name of the weights; the only safetensors file if there is none of the default name."""
    if weights_file != WEIGHTS or not folder.is_dir() or (folder / weights_file).is_file():
        return weights_file
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SAFETENSORS)
    return found[0] if len(found) == 1 else weights_file


def _advise(folder: Path) -> str:
    """Return advice on a folder that is no original checkpoint, as the end of a sentence."""
    if (folder / "config.json").is_file():
        return "; this folder has a config.json: if it is a model of transformers, load it without converting it"
    if folder.is_dir() and (
        found := sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".pt", ".pth", SAFETENSORS))
    ):
        return f"; name the weights with --weights_file, e.g. {found[0]}"
    return ""


def unwrap_keys(weights: dict[str, Tensor], path: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return a state dict without the prefixes that wrappers of PyTorch add to its keys, and how often each occurred.

    Args:
        weights: key → tensor.
        path: path of the weights, for the error.

    Raises:
        ValueError: two keys differ only in such prefixes.
    """
    unwrapped: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for key, tensor in weights.items():
        parts = key.split(".")
        bare = ".".join(part for part in parts if part not in _WRAPPERS)
        if bare in unwrapped:
            raise ValueError(f"{path}: {key!r} and another key are two names of the weights {bare!r}; keep one of them")
        unwrapped[bare] = tensor
        for part in _WRAPPERS.intersection(parts):
            counts[f"{part}."] = counts.get(f"{part}.", 0) + 1
    return unwrapped, dict(sorted(counts.items()))


def read_args(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings in args.json, and the names of the published settings that it lacks.

    Raises:
        ValueError: the file is not a JSON object, or a setting is missing or invalid.
    """
    # null is how scGPT's code writes an option that was not set.
    written = {name: value for name, value in _read_object(path).items() if value is not None}
    for name in _REQUIRED:
        if name not in written:
            raise ValueError(f"{path}: {name!r} is missing; expected a whole number ≥ {_MINIMUM[name]}")
    for name, value in written.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LIMIT
        if name in _MINIMUM and not (is_number and isinstance(value, int) and value >= _MINIMUM[name]):
            raise ValueError(f"{path}: {name!r} is {value!r}; expected a whole number ≥ {_MINIMUM[name]}")
        if name in _NUMBERS and not is_number:
            raise ValueError(f"{path}: {name!r} is {value!r}; expected a number")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{path}: {name!r} is {value!r}; expected {' or '.join(map(repr, _CHOICES[name]))}")
    if written["embsize"] % written["nheads"]:
        raise ValueError(
            f"{path}: 'nheads' is {written['nheads']}, which does not divide 'embsize' {written['embsize']}"
        )
    if not 0 <= written.get("dropout", 0) < 1:
        raise ValueError(f"{path}: 'dropout' is {written['dropout']}; expected a number in [0, 1)")
    return _PUBLISHED | written, tuple(name for name in _PUBLISHED if name not in written)


def read_vocab(path: Path) -> dict[str, int]:
    """Return the id of each token.

    Raises:
        ValueError: the file is not a JSON object with the values 0, 1, 2, …, or lacks `<pad>` or `<cls>`.
    """
    vocab = _read_object(path)
    try:
        check_vocab(vocab)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return vocab


def read_weights(path: Path) -> dict[str, Tensor]:
    """Load a state dict to the CPU. Only tensors are loaded, so a pickle that contains code does not run it.

    Args:
        path: a file written by torch.save, or a safetensors file, whatever its name.

    Raises:
        ValueError: the file is damaged, or is not a state dict.
    """
    kind = describe_file(path)
    is_safetensors = kind == "a safetensors file" or path.suffix.lower() == SAFETENSORS
    weights = _read_safetensors(path, kind) if is_safetensors else _read_pickle(path, kind)
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} contains {_type_name(weights)}; expected a state dict, {{name: tensor}}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"{path}: key {key!r} contains {_type_name(value)}; expected a state dict, {{name: tensor}}; if this "
                "is a training checkpoint, save only the weights in it"
            )
    return dict(weights)


def _read_safetensors(path: Path, kind: str | None) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}{_found(kind)}") from error


def _read_pickle(path: Path, kind: str | None) -> Any:
    """Return the object that torch.save wrote."""
    try:
        # Damaged files can look like an unusual pickle protocol, about which torch warns before it fails.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (pickle.UnpicklingError, *_DAMAGED, struct.error) as error:
        if other := _found(kind):
            raise ValueError(f"{path} was not written by torch.save{other}") from error
        if not isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} is damaged or was not written by torch.save: {error}; download it again"
            ) from error
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = f"contains a call of {refused[1]}" if refused else "is damaged or is not a pickle of tensors"
        # `from None`, because PyTorch's message recommends turning this protection off.
        raise ValueError(
            f"{path} {found}. It was loaded with weights_only=True, because a pickle can contain code; none of it was "
            "run. If you trust the author, ask them to save only the state dict: torch.save(model.state_dict(), path)"
        ) from None


def _found(kind: str | None) -> str:
    """Return the kind of a file as the end of a sentence; nothing if weights are stored in such files."""
    return "" if kind in (None, "a ZIP archive", "a Python pickle", "a safetensors file") else f": it is {kind}"


def _type_name(value: Any) -> str:
    empty = "an empty " if isinstance(value, dict) and not value else ""
    return f"{empty}{type(value).__name__}"


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise ValueError if a key occurs twice, of which `json` keeps only the last."""

    def require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"key {key!r} occurs twice")
            content[key] = value
        return content

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=require_unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a JSON {type(content).__name__}; expected an object, {{name: value}}")
    return content
