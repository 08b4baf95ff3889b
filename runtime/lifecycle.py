"""The life of an instance: created, registered, running, healthy, stopping, deregistered.

A closed state machine. It says which step may follow which, when the last was taken, and tells
its listeners; a step that may not be taken is a programmer's error and asserted. `healthy` may
fall back to `running`, when its health checks fail, and any state may go on to `stopping`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final


class State(StrEnum):
    CREATED = "created"
    REGISTERED = "registered"  # others can see it
    RUNNING = "running"  # it takes requests
    HEALTHY = "healthy"  # and its health check has passed
    STOPPING = "stopping"  # it finishes what it has
    DEREGISTERED = "deregistered"  # nobody finds it any more


NEXT: Final[dict[State, frozenset[State]]] = {
    State.CREATED: frozenset({State.REGISTERED, State.STOPPING}),
    State.REGISTERED: frozenset({State.RUNNING, State.STOPPING}),
    State.RUNNING: frozenset({State.HEALTHY, State.STOPPING}),
    State.HEALTHY: frozenset({State.RUNNING, State.STOPPING}),
    State.STOPPING: frozenset({State.DEREGISTERED}),
    State.DEREGISTERED: frozenset(),
}
SERVING: Final = frozenset({State.RUNNING, State.HEALTHY})

Listener = Callable[[State, State], None]  # before, after


class Lifecycle:
    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._state = State.CREATED
        self._since_s = clock()
        self._listeners: list[Listener] = []

    @property
    def state(self) -> State:
        return self._state

    @property
    def since_s(self) -> float:
        """When the present state was entered, by the wall clock."""
        return self._since_s

    def may(self, state: State) -> bool:
        return state in NEXT[self._state]

    def to(self, state: State) -> None:
        """Take a step; the caller knows that it `may`."""
        before = self._state
        assert self.may(state), f"an instance that is {before} may not become {state}"
        self._state = state
        self._since_s = self._clock()
        for listener in list(self._listeners):
            listener(before, state)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Called with each step, in the order of listening; returns what ends it."""
        self._listeners.append(listener)

        def end() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return end
