"""The pretrained models that are installed with the package, by name. Each has a model card beside its weights."""

import os
from pathlib import Path

MODELS = os.path.join(os.path.dirname(__file__), "models")  # no Path: tests of other platforms import this
DEFAULT_MODEL = "blood-mini"  # what embedding uses when no model is given


def packaged_model(name: str = DEFAULT_MODEL) -> Path:
    """Return the folder of a model that is installed with the package.

    Functions and commands of this package take the name itself. The Auto classes of transformers take the folder.

    Args:
        name: name of the model. `blood-mini`, the only one so far, embeds human blood and bone marrow cells; its card,
            `README.md` in the folder, says how it was trained and how good it is.

    Returns:
        The folder, with config, weights, processor and card. It belongs to the installation: copy it, do not change it.

    Raises:
        ValueError: the package has no such model; the message lists those that it has.

    Example:
        >>> model = AutoModel.from_pretrained(packaged_model("blood-mini"))
        >>> model.config.hidden_size
        128
    """
    if name not in packaged_names():
        raise ValueError(f"the package has no model {name!r}; it has {', '.join(packaged_names())}")
    return Path(MODELS, name)


def packaged_names() -> list[str]:
    """Return the names of the models of the package."""
    return sorted(folder.name for folder in Path(MODELS).iterdir() if (folder / "config.json").is_file())


def locate_checkpoint(name: str | Path) -> str | Path:
    """Return where a checkpoint is: the folder of a model of the package, or what was given.

    A folder in the current directory takes precedence over a model of the package with the same name.
    """
    is_packaged = not Path(name).exists() and str(name) in packaged_names()
    return Path(MODELS, name) if is_packaged else name
