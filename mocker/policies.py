"""The seam through which replay asks where a request goes; `routing.py` has what answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mocker.engine import Engine
from mocker.events import BlockEvent
from mocker.sequence import Record, Request


@dataclass(slots=True)
class Worker:
    """An engine as a policy may see it."""

    index: int
    node: int
    engine: Engine


class Policy(Protocol):
    """Called in the order of time, all times in picoseconds.

    Events are given before any choice made at their time or later. Engines are synced with
    `now_ps` when `choose` is called.
    """

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        """The index of the worker that gets the request."""
        ...

    def on_event(self, event: BlockEvent) -> None: ...

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None: ...

    def on_end(self, record: Record) -> None: ...

    def on_refused(self, request_id: int) -> None:
        """The engine would not take what `choose` sent there."""
        ...
