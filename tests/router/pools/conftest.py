"""A NATS server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runtime.embedded import EmbeddedNats


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(tmp_path_factory.mktemp("nats")) as server:
        yield server
