"""Fixtures: a local Hub, and a process in which the `huggingface_hub` client talks to it."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.support.hub_run import make_run
from tests.support.hub_server import Client, Hub, client_environment


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """Serve the local Hub."""
    with Hub() as served:
        yield served


@pytest.fixture(scope="session")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Return a callable: `client(function, *arguments)` calls the function in a process that talks to `hub`.

    The client reads its environment variables on import, so it needs a separate process.
    """
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pool, pytest.MonkeyPatch.context() as patch:
        for name, value in client_environment(hub, tmp_path_factory.mktemp("hf_home")).items():
            patch.setitem(os.environ, name, value)
        pool.submit(os.getpid).result()  # starts the process, which inherits the variables
        patch.undo()
        yield lambda function, *arguments, **keywords: pool.submit(function, *arguments, **keywords).result()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a complete run folder, with stand-ins for weights and code."""
    return make_run(tmp_path / "blood")
