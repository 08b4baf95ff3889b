"""A NATS server for the tests of a module, and patience with a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from router.pools import local_router
from runtime.embedded import EmbeddedNats


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop has pools' routers and engines too, and may be late to hear of a request's end."""
    monkeypatch.setattr(local_router, "TELL_TIMEOUT_S", 60.0)
