"""The seam through which replay asks where a request goes, and simple policies behind it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mocker.engine import Engine
from mocker.events import BlockEvent
from mocker.sequence import Record, Request


@dataclass(slots=True)
class Worker:
    """An engine as a policy may see it. `requests`: sent there and not ended yet."""

    index: int
    node: int
    engine: Engine
    requests: int = 0


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


class Deaf:
    """For policies that need no callbacks."""

    def on_event(self, event: BlockEvent) -> None:
        """Without use."""

    def on_first_token(self, request_id: int, worker: int, now_ps: int) -> None:
        """Without use."""

    def on_end(self, record: Record) -> None:
        """Without use."""


class RoundRobin(Deaf):
    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        self._next += 1
        return (self._next - 1) % len(workers)


class RandomChoice(Deaf):
    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        return self._dice.randrange(len(workers))


class LeastLoaded(Deaf):
    """The fewest requests; the first of those that have equally many."""

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        return min(workers, key=lambda worker: worker.requests).index


class PowerOfTwo(Deaf):
    """The one with fewer requests of two drawn by lot."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def choose(self, request: Request, workers: Sequence[Worker], now_ps: int) -> int:
        if len(workers) == 1:
            return 0
        first, second = self._dice.sample(range(len(workers)), 2)
        return first if workers[first].requests <= workers[second].requests else second


def policy_named(name: str, seed: int) -> Policy:
    """Raises ValueError for a name that is none."""
    match name:
        case "round-robin":
            return RoundRobin()
        case "random":
            return RandomChoice(seed)
        case "least-loaded":
            return LeastLoaded()
        case "power-of-two":
            return PowerOfTwo(seed)
        case _:
            raise ValueError(f"{name!r} is none of round-robin, random, least-loaded, power-of-two")
