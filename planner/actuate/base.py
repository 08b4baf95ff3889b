"""The seam between deciding and doing.

An actuator is called once a tick and returns soon; what takes longer, as a drain, it goes on with
at the next tick. It knows what was asked of it, and sees from the other side what others asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from planner.decide import Decision
from planner.fleet import Member
from runtime.engine_card import Role


class ActuateError(Exception):
    """The other side could not be reached or would not; the next tick tries again."""


@dataclass(frozen=True, slots=True)
class Applied:
    """`accepted`: the decision is now what is being worked towards. `text`: what was done."""

    accepted: bool
    text: str


class Actuator(Protocol):
    """All calls from one event loop."""

    kind: str
    acts: bool  # no: decisions are only told

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def desired(self) -> Mapping[Role, int]:
        """What is asked for at the other side now; empty where it has no such number.

        Raises ActuateError.
        """
        ...

    async def apply(self, decision: Decision, members: Sequence[Member]) -> Applied:
        """Work towards the decision's targets. Raises ActuateError."""
        ...


def surplus(members: Sequence[Member], role: Role, count: int) -> list[Member]:
    """So many engines to do without: those that do not serve yet, then those with least to do."""
    able = [m for m in members if m.role == role and m.phase != "draining"]
    able.sort(key=lambda m: (m.phase == "serving", m.requests, m.name.id))
    return able[: max(count, 0)]
