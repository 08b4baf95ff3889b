"""Nodes that are checked when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.kvbm import builders
from tests.kvbm.builders import Node


@pytest.fixture
def make_node() -> Iterator[Callable[..., Node]]:
    """Builds nodes; their integrity is checked at the end."""
    nodes: list[Node] = []

    def make(*wraps: builders.Wrap, **options: object) -> Node:
        nodes.append(builders.make_node(*wraps, **options))  # type: ignore[arg-type]
        return nodes[-1]

    yield make
    for node in nodes:
        node.check()
        node.arena.close()


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    return make_node()
