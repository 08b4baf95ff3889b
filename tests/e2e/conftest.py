"""Engines for the end-to-end tests. A start costs more than a minute: share one where possible.

`engines` starts any number of them for the tests of one module and ends them with it. What an
engine needs beside its model (a daemon's socket, options of the connector) the test gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from examples.demo.engine import Engine, EngineConfig
from tests.models import tiny_hybrid, tiny_llama

E2E = Path(__file__).parent


class StartEngine(Protocol):
    """Starts an engine and waits for it; several names are started side by side."""

    def __call__(self, *names: str, model: Path, **config: Any) -> list[Engine]: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(E2E):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with one cache group."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with two cache groups: sliding window and full attention."""
    return tiny_hybrid(tmp_path_factory.mktemp("models") / "tiny-hybrid")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartEngine]:
    """Engines that end with the module: `[engine] = engines("a", model=llama, socket=path)`."""
    logs = tmp_path_factory.mktemp("engines")
    with ExitStack() as running:

        def start(*names: str, model: Path, **config: Any) -> list[Engine]:
            settings = EngineConfig(model=str(model), **{"context_tokens": 4096, **config})
            started = [Engine(name, settings, logs=logs) for name in names]
            for engine in started:
                running.callback(engine.stop)
                engine.start()
            for engine in started:
                engine.wait_ready()
            return started

        yield start
