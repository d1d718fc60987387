"""The three files of an original scGPT checkpoint, read and checked one by one: args.json, vocab.json, best_model.pt.

Whether they agree with each other is asked in `convert.py`; what the keys of the weights mean, in `convert_keys.py`.
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

# Required settings first; the others have these values in the published checkpoints (scGPT_human and its siblings).
_SIZES = ("embsize", "nheads", "d_hid", "nlayers", "n_bins")
_PUBLISHED: dict[str, Any] = {
    **{"max_seq_len": 1200, "dropout": 0.2, "pad_value": -2, "mask_value": -1},
    **{"pad_token": PAD, "input_style": "binned"},
}
_WHOLE = dict.fromkeys((*_SIZES, "n_layers_cls"), 1) | {"n_bins": 2, "max_seq_len": 2}  # and the least of each
_TOO_LARGE = 2**31  # and not below it: infinity and NaN
_NUMBERS = {"dropout", "pad_value", "mask_value"}
_CHOICES = {
    "pad_token": (PAD,),
    "input_style": ("binned", "log1p"),
    "input_emb_style": ("continuous", "category", "scaling"),
}
# What PyTorch was seen to raise on damaged files, beside UnpicklingError.
_DAMAGED = (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError)


@dataclass(frozen=True)
class OriginalFiles:
    """What the files say.

    Attributes:
        args: the settings that conversion needs, those not recorded at their published values.
        unrecorded: names of the latter.
        vocab: id of each token.
        weights: tensors by original key, on the CPU.
        where: path of the weights, for messages.
    """

    args: dict[str, Any]
    unrecorded: tuple[str, ...]
    vocab: dict[str, int]
    weights: dict[str, Tensor]
    where: str


def read_original(folder: Path, weights_file: str) -> OriginalFiles:
    """Return what the three files of a checkpoint say.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a file is not what it should be; the message names it and the key.
    """
    names = (ARGS, VOCAB, weights_file)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)} (found: {found}); an original checkpoint is a folder with "
            f"{', '.join(names)}"
        )
    args, unrecorded = read_args(folder / ARGS)
    return OriginalFiles(
        args, unrecorded, read_vocab(folder / VOCAB), read_weights(folder / weights_file), str(folder / weights_file)
    )


def read_args(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings that conversion needs, and the names of those the file does not record.

    Raises:
        ValueError: the file is not a JSON object, or a setting is missing or of another kind.
    """
    written = {name: value for name, value in _read_object(path).items() if value is not None}
    for name in _SIZES:
        if name not in written:
            raise ValueError(f"{path}: {name!r} is missing; expected a whole number ≥ {_WHOLE[name]}")
    for name, value in written.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE
        if name in _WHOLE and not (number and isinstance(value, int) and value >= _WHOLE[name]):
            raise ValueError(f"{path}: {name!r} is {value!r}; expected a whole number ≥ {_WHOLE[name]}")
        if name in _NUMBERS and not number:
            raise ValueError(f"{path}: {name!r} is {value!r}; expected a number")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{path}: {name!r} is {value!r}; scgpt_hf knows {' and '.join(map(repr, _CHOICES[name]))}")
    if written["embsize"] % written["nheads"]:
        raise ValueError(
            f"{path}: 'nheads' is {written['nheads']}, which does not divide 'embsize' {written['embsize']}"
        )
    if not 0 <= written.get("dropout", 0) < 1:
        raise ValueError(f"{path}: 'dropout' is {written['dropout']}; expected a share in [0, 1)")
    return _PUBLISHED | written, tuple(name for name in _PUBLISHED if name not in written)


def read_vocab(path: Path) -> dict[str, int]:
    """Return the id of each token.

    Raises:
        ValueError: the file is not a JSON object of whole numbers 0, 1, 2, …, or lacks `<pad>` or `<cls>`.
    """
    vocab = _read_object(path)
    try:
        check_vocab(vocab)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return vocab


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict by key, on the CPU; nothing else that a pickle may hold is opened.

    Raises:
        ValueError: the file holds something else, or is damaged.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):  # of unusual protocols; it tries them
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = f"asks for {refused[1]}" if refused else "is damaged or no pickle of tensors"
        # Not `from error`: PyTorch's message advises to switch the protection off.
        raise ValueError(
            f"{path} {found}. It is opened with weights_only=True: a pickle can run code, so anything but tensors is "
            "refused, and nothing in it has run. If you trust its maker, let them save the state dict alone: "
            "torch.save(model.state_dict(), path)"
        ) from None
    except (*_DAMAGED, struct.error) as error:
        raise ValueError(f"{path} is damaged or not a file of torch.save: {error}; fetch it again") from error
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} holds {_name_of(weights)}; expected a state dict, tensors by name")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"{path}: key {key!r} holds {_name_of(value)}; expected a state dict, tensors by name; of a training "
                "checkpoint, save the part with the weights alone"
            )
    return dict(weights)


def _name_of(value: Any) -> str:
    empty = "an empty " if isinstance(value, dict) and not value else ""
    return f"{empty}{type(value).__name__}"


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; a key that occurs twice raises, which `json` would pass over."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"key {key!r} occurs twice")
            content[key] = value
        return content

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not the JSON it should be: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object, {{name: value}}")
    return content
