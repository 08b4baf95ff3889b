"""Decides, tells, and does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.actuate.base import Applied
from planner.decide import Decision
from planner.fleet import Member
from runtime.engine_card import Role


class DryRun:
    kind = "dry-run"
    acts = False

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def desired(self) -> Mapping[Role, int]:
        return {}

    async def apply(self, decision: Decision, members: Sequence[Member]) -> Applied:
        del decision, members
        return Applied(accepted=False, text="nothing is done")
