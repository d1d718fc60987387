"""Read the settings of a run from a YAML file and a command line, and write them back as YAML.

A YAML file has the sections `data:`, `model:` and `training:`. Flags take precedence over it. Without a YAML file the
values of `configs/demo.yaml` apply, so that a command without arguments trains the demo.
"""

import dataclasses
import difflib
import types
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from scgpt_hf.training.settings import DEFAULT_BATCH_KEY, DataSettings, ModelSettings, Settings, TrainingSettings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # installed with the package
SECTIONS: dict[str, type] = {"data": DataSettings, "model": ModelSettings, "training": TrainingSettings}
_SECRETS = {"hub_token", "push_to_hub_token"}
_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


class ExampleHelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Show the examples of a command as they are written, and the default of every flag that has one."""

    def _get_help_string(self, action: Action) -> str | None:
        # A switch without a value is off by default, and "None" would say nothing.
        no_default = action.nargs == 0 or action.default in (None, [], ())
        return action.help if no_default or "(default" in (action.help or "") else super()._get_help_string(action)


def parse_settings(arguments: list[str], description: str = "") -> Settings:
    """Return the settings of a command line.

    Args:
        arguments: command line without the program's name. The first one may be a YAML file, in the current folder or
            among the configs of the package, or the name of such a config: "blood-300k" is `blood_300k.yaml`.
        description: text at the top of `--help`.

    Raises:
        ValueError: an unknown setting, or a value of the wrong type or out of range. The message names the setting and,
            if one is similar, the known setting that was probably meant.
        SystemExit: `--help`, or a flag that argparse rejects.

    Example:
        >>> settings = parse_settings(["--data", "cells.h5ad", "--num_train_epochs", "3"])
        >>> settings.data.data, settings.training.num_train_epochs
        (['cells.h5ad'], 3.0)
    """
    names_file = bool(arguments) and not arguments[0].startswith("-")
    base = read_yaml(find_config(arguments[0]) if names_file else CONFIGS / "demo.yaml")
    return _make_settings(base, arguments[names_file:], description)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file, without their sections.

    Args:
        path: the file. If it does not exist, the config of the package with the same file name is read.

    Raises:
        ValueError: there is no such file, it is not valid YAML, or a section, setting or value is not valid. The
            message names file, section, setting, value and what was expected.
    """
    content = _load_yaml(path if path.is_file() else CONFIGS / path.name, path)
    flat: dict[str, Any] = {}
    for section, values in content.items():
        if section not in SECTIONS:
            raise ValueError(f"unknown section {section!r} in {path}{_suggest(section, SECTIONS)}")
        expected = _types_of(SECTIONS[section])
        for name, value in values.items():
            if name not in expected:
                raise ValueError(f"unknown setting {name!r} in section {section!r} of {path}{_suggest(name, expected)}")
            try:
                flat[name] = _convert(value, expected[name])
            except TypeError as error:
                # YAML 1.1 reads the words no, off, yes and on as booleans.
                hint = "; put the word in quotes" if isinstance(value, bool) else ""
                raise ValueError(
                    f"{path}: expected {_describe(expected[name])} for {name!r} in section {section!r}, "
                    f"found {value!r}{hint}"
                ) from error
    return flat


def make_settings(config: str | Path | None = None, **changes: Any) -> Settings:
    """Return the settings of a YAML file or of a config of the package, with some of them changed.

    Args:
        config: see `read_yaml`; the name of a config of the package, such as "blood-300k"; None for the demo.
        changes: settings by name, as in YAML. A value of None is a value, too.

    Raises:
        ValueError: see `parse_settings`.

    Example:
        >>> settings = make_settings(data="cells.h5ad", num_train_epochs=3)
        >>> settings.data.data, settings.training.num_train_epochs
        (['cells.h5ad'], 3.0)
    """
    flat = read_yaml(CONFIGS / "demo.yaml" if config is None else find_config(str(config)))
    expected = {name: kind for cls in SECTIONS.values() for name, kind in _types_of(cls).items()}
    for name, value in changes.items():
        if name not in expected:
            raise ValueError(f"unknown setting {name!r}{_suggest(name, expected)}")
        try:
            flat[name] = _convert(_plain_path(value), expected[name])
        except TypeError as error:
            raise ValueError(f"expected {_describe(expected[name])} for {name!r}, found {value!r}") from error
    return _make_settings(flat, [], "")


def find_config(name: str) -> Path:
    """Return the path of a YAML file, or of the config of the package that a name means.

    Raises:
        ValueError: the name has no suffix of YAML, and the package has no such config.

    Example:
        >>> find_config("blood-300k").name
        'blood_300k.yaml'
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = CONFIGS / f"{name.replace('-', '_')}.yaml"
    if not path.is_file():
        known = sorted(config.stem.replace("_", "-") for config in CONFIGS.glob("*.yaml"))
        raise ValueError(f"unknown config {name!r}{_suggest(name, known)}; name a YAML file, or one of {known}")
    return path


def settings_yaml(settings: Settings) -> str:
    """Return the settings as YAML that `parse_settings` reads back as the same run. Credentials are left out."""
    return str(yaml.safe_dump(settings.requested, sort_keys=False, allow_unicode=True, width=120))


def _make_settings(base: dict[str, Any], flags: list[str], description: str) -> Settings:
    """Return the settings of a YAML file, which flags of a command line replace."""
    parser = HfArgumentParser(
        list(SECTIONS.values()),  # type: ignore[arg-type]
        description=description,
        formatter_class=ExampleHelpFormatter,
        allow_abbrev=False,
    )
    parser.usage = "%(prog)s [SETTINGS.yaml | NAME] [--flag VALUE …]"
    library_defaults = {name: parser.get_default(name) for name in _all_names()}
    parser.set_defaults(**base)
    data, model, training, unknown = parser.parse_args_into_dataclasses(
        flags, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}{_suggest(unknown[0].lstrip('-'), _all_names())}")
    given = vars(parser.parse_known_args(flags)[0])
    settings = Settings(data, model, training, _requested(given, library_defaults))
    weights = model.loss_weights or {}
    if data.batch_key is None and (weights.get("counts") or weights.get("views")):
        # The count decoder has a bias for each experimental batch, and views contrast the cells of one.
        data.batch_key = DEFAULT_BATCH_KEY
    if data.batch_key is None and (model.domain_embedding or model.domain_head):
        raise ValueError("domain_embedding and domain_head need --batch_key, the obs column of the experimental batch")
    return settings


def _load_yaml(path: Path, named: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a YAML file; `named` is the path that the user gave, for messages."""
    if not path.is_file():
        known = ", ".join(sorted(config.name for config in CONFIGS.glob("*.yaml")))
        raise ValueError(f"there is no settings file {named}; the package has {known}")
    try:
        text = path.read_text(encoding="utf-8")
        # An alias can refer to itself, or make a small file expand without limit.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has an alias (*name); write the value itself")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {named} as YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"expected {named} to hold the sections {', '.join(SECTIONS)}, each with its settings")
    return content


def _convert(value: Any, expected: Any) -> Any:
    """Return a YAML value as the type of its setting.

    A number may be written as 3e-4, which YAML 1.1 reads as text. A single value stands for a list of one.

    Raises:
        TypeError: the value is of another type.
    """
    kind: Any = get_origin(expected)
    options = get_args(expected)
    if kind in {Union, types.UnionType}:
        return _convert_any(value, options)
    if kind is list:
        return [_convert(item, options[0]) for item in (value if isinstance(value, list) else [value])]
    if kind is dict and isinstance(value, dict):
        return {_convert(name, options[0]): _convert(item, options[1]) for name, item in value.items()}
    if expected is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError) as error:
            raise TypeError from error
    if kind is Literal:
        valid = any(value is option or (type(value) is type(option) and value == option) for option in options)
    elif isinstance(expected, type) and issubclass(expected, Enum):
        valid = value in {member.value for member in expected}
    elif isinstance(expected, type):
        valid = isinstance(value, expected) and not (expected is int and isinstance(value, bool))
    else:
        valid = expected is Any
    if not valid:
        raise TypeError
    return value


def _convert_any(value: Any, options: Iterable[Any]) -> Any:
    """Return a value as the first of several types that it fits."""
    # Lists come last, because any single value would also fit as a list of one.
    for option in sorted(options, key=lambda option: getattr(option, "__origin__", None) is list):
        try:
            return _convert(value, option)
        except TypeError:
            continue
    raise TypeError


def _describe(expected: Any) -> str:
    """Return a type in words."""
    kind: Any = get_origin(expected)
    options = get_args(expected)
    if kind in {Union, types.UnionType}:
        return " or ".join(dict.fromkeys(map(_describe, options)))
    if kind is Literal:
        return "one of " + ", ".join(map(repr, options))
    if kind is list:
        return f"a list of values, each {_describe(options[0])}"
    if kind is dict or expected is dict:
        return "names with values"
    if isinstance(expected, type) and issubclass(expected, Enum):
        return "one of " + ", ".join(repr(member.value) for member in expected)
    return _TYPE_NAMES.get(expected, getattr(expected, "__name__", str(expected)))


def _requested(given: dict[str, Any], library_defaults: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by section the values that determine the run, before `__post_init__` derives others from them.

    All settings of ours are included, those of the library only if they differ from its defaults.
    """
    requested = {}
    for section, cls in SECTIONS.items():
        requested[section] = {
            name: _plain(given[name])
            for name in _types_of(cls)
            if name not in _SECRETS
            if cls is not TrainingSettings or name in cls.__annotations__ or given[name] != library_defaults[name]
        }
    return requested


def _plain_path(value: Any) -> Any:
    """Return a path, or a list of paths, as text."""
    if isinstance(value, list | tuple):
        return [_plain_path(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _plain(value: Any) -> Any:
    """Return a value that YAML can hold. The library turns some words into enumerations."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _types_of(cls: Any) -> dict[str, Any]:
    """Return the type of each setting of a section."""
    annotations = get_type_hints(cls)
    return {owned.name: annotations[owned.name] for owned in dataclasses.fields(cls) if owned.init}


def _all_names() -> list[str]:
    return [name for cls in SECTIONS.values() for name in _types_of(cls)]


def _suggest(name: Any, known: Iterable[str]) -> str:
    """Return a hint: the known name that is most similar, or the first known names."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)[:20])} …"
