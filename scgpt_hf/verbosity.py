"""Set how much the package reports: its log, and the progress bars of the libraries that it runs."""

import logging
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]


def set_verbosity(level: Level) -> None:
    """Set which messages of the package are shown, in the form in which its commands show them.

    The package logs under the name `scgpt_hf`, so that `logging` can also be configured in any other way. Without this
    call, Python shows warnings only.

    Args:
        level: "info" reports what is read, matched and written; "warning", what may be wrong; "error", neither, and
            progress bars of transformers are hidden.

    Raises:
        ValueError: there is no such level.

    Example:
        >>> set_verbosity("info")
        >>> logging.getLogger("scgpt_hf").level == logging.INFO
        True
        >>> set_verbosity("warning")
    """
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    if level not in levels:
        raise ValueError(f"unknown level {level!r}; expected one of {', '.join(levels)}")
    package = logging.getLogger("scgpt_hf")
    package.setLevel(levels[level])
    # A program that has configured logging shows the messages in its own way.
    if not package.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    from transformers.utils import logging as transformers_logging

    if level == "error":
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    else:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
