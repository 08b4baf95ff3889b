"""Nodes that are checked when their test ends, and the `kvbm` command."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import structlog

from kvbm.cli import __main__ as cli
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


class Run(NamedTuple):
    status: int
    out: str
    err: str

    def json(self) -> Any:
        assert not self.err, self.err
        return json.loads(self.out)


Kvbm = Callable[..., Run]


@pytest.fixture
def logging_kept() -> Iterator[None]:
    """What a program sets up of logging, and its stream, end with the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def kvbm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logging_kept: None
) -> Kvbm:
    """The command as `kvbm` runs it, in this process."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["kvbm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Run(int(ended.value.code or 0), out, err)

    return run
