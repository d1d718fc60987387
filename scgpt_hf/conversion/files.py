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
from torch import Tensor

from scgpt_hf.tokens.vocabulary_scgpt import PAD, check_vocab

ARGS, VOCAB, WEIGHTS = "args.json", "vocab.json", "best_model.pt"

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
        weights: original key → tensor on the CPU.
        weights_path: path of the weights, for error messages.
    """

    args: dict[str, Any]
    missing_args: tuple[str, ...]
    vocab: dict[str, int]
    weights: dict[str, Tensor]
    weights_path: str


def read_original(folder: Path, weights_file: str) -> OriginalFiles:
    """Read and check the three files of a checkpoint.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a file is invalid; the message names the file and the key.
    """
    names = (ARGS, VOCAB, weights_file)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)} (found: {found}); an original checkpoint is a folder with "
            f"{', '.join(names)}"
        )
    args, missing_args = read_args(folder / ARGS)
    return OriginalFiles(
        args, missing_args, read_vocab(folder / VOCAB), read_weights(folder / weights_file), str(folder / weights_file)
    )


def read_args(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings in args.json, and the names of the published settings that it lacks.

    Raises:
        ValueError: the file is not a JSON object, or a setting is missing or invalid.
    """
    # null is how the original writes an option that was not set.
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

    Raises:
        ValueError: the file is damaged, or is not a state dict.
    """
    try:
        # Damaged files can look like an unusual pickle protocol, about which torch warns before it fails.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = f"contains a call of {refused[1]}" if refused else "is damaged or is not a pickle of tensors"
        # `from None`, because PyTorch's message recommends turning this protection off.
        raise ValueError(
            f"{path} {found}. It was loaded with weights_only=True, because a pickle can contain code; none of it was "
            "run. If you trust the author, ask them to save only the state dict: torch.save(model.state_dict(), path)"
        ) from None
    except (*_DAMAGED, struct.error) as error:
        raise ValueError(f"{path} is damaged or was not written by torch.save: {error}; download it again") from error
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} contains {_type_name(weights)}; expected a state dict, {{name: tensor}}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"{path}: key {key!r} contains {_type_name(value)}; expected a state dict, {{name: tensor}}; if this "
                "is a training checkpoint, save only the weights in it"
            )
    return dict(weights)


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
