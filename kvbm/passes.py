"""Going over all that a tier keeps, slowly and for ever, and at once when somebody asks."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final

IDLE_S: Final = 1.0


@dataclass(slots=True)
class ScrubPass:
    """One pass: how far it is, or what it found."""

    total: int = 0  # chunks there when it began
    checked: int = 0
    damaged: int = 0
    unreadable: int = 0  # the medium failed; nothing is known of the bytes
    seconds: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Passes(ABC):
    """Call from the tier's event loop; `run` until cancelled."""

    def __init__(self, pass_s: float) -> None:
        self._pass_s = pass_s
        self._asked = asyncio.Event()
        self.passes = 0  # of those that nobody asked for
        self.latest: ScrubPass | None = None  # of those asked for

    async def run(self) -> None:
        """Passes of about `pass_s` seconds each, none if that is 0; and those asked for."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._steadily())
            group.create_task(self._serve())

    def ask(self) -> ScrubPass:
        """Begin a pass as fast as may be; the one under way if there is one."""
        if self.latest is None or self.latest.ended.is_set():
            self.latest = ScrubPass()
            self._asked.set()
        return self.latest

    async def _steadily(self) -> None:
        while self._pass_s > 0:
            run = ScrubPass()
            await self._pass_over(run, self._pass_s)
            if run.total:
                self.passes += 1
            else:
                await asyncio.sleep(min(IDLE_S, self._pass_s))

    async def _serve(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            assert self.latest is not None, "set before it is asked for"
            await self._pass_over(self.latest, 0.0)
            self.latest.ended.set()

    @abstractmethod
    async def _pass_over(self, run: ScrubPass, pass_s: float) -> None:
        """Check every chunk, in about so many seconds; 0: as fast as may be."""
