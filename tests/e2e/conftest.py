"""Engines and daemons for the end-to-end tests.

An engine's start costs half a minute, nearly all of it imports: modules start all theirs side
by side and share them between their tests.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from examples.demo.engine import Engine, EngineConfig
from runtime.embedded import EmbeddedS3
from tests.models import tiny_hybrid, tiny_llama

E2E = Path(__file__).parent
BUCKET = "e2e"
# With one thread for each core, as vLLM has it, an engine waits for whatever else the cores do: a
# request that takes half a second took thirteen on two busy cores.
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


class StartEngines(Protocol):
    """Starts engines, each named with what its configuration differs in, and waits for all."""

    def __call__(self, **configs: dict[str, Any]) -> list[Engine]: ...


class MakeDaemon(Protocol):
    """A daemon that is not started yet and ends with its module; takes DaemonConfig's fields."""

    def __call__(self, **config: Any) -> Daemon: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked is what lies here: `make test` runs this folder, and then what is unmarked."""
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


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with EmbeddedS3(tmp_path_factory.mktemp("s3"), buckets=[BUCKET]) as server:
        yield server


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartEngines]:
    """`a, b = engines(a=dict(model=llama, socket=path), b=dict(...))`"""
    logs = tmp_path_factory.mktemp("engines")
    with ExitStack() as running:

        def start(**configs: dict[str, Any]) -> list[Engine]:
            started: list[Engine] = []
            for name, config in configs.items():
                settings = {
                    "context_tokens": 4096,
                    "environment": tuple(ONE_THREAD.items()),
                    **config,
                    "model": str(config["model"]),
                }
                engine = Engine(name, EngineConfig(**settings), logs=logs)
                running.callback(engine.stop)
                engine.start()
                started.append(engine)
            for engine in started:
                engine.wait_ready()
            return started

        yield start


@pytest.fixture(scope="module")
def make_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeDaemon]:
    with ExitStack() as running:

        def make(**config: Any) -> Daemon:
            folder = tmp_path_factory.mktemp("daemon")
            # A socket's path must be short.
            runtime = Path(tempfile.mkdtemp(prefix="kvbm-e2e-"))
            running.callback(shutil.rmtree, runtime, ignore_errors=True)
            settings = DaemonConfig(
                folder=folder, socket=runtime / "s", logs=folder, records=folder, **config
            )
            daemon = Daemon(settings)
            running.callback(daemon.process.stop)
            return daemon

        yield make


def s3_settings(server: EmbeddedS3) -> dict[str, Any]:
    """The daemon's `s3` section for the tests' server."""
    return {
        **server.settings(BUCKET),
        "linger": "100ms",
    }
