"""One engine's life in discovery: registered, running, healthy, stopping, deregistered.

`watch` looks at the engine at a fixed pace and makes the record say what was seen; `drain` tells
routers to stop and waits for what is in flight. A look is bad if `/health` fails, or if an engine
that has computed nothing for a while does not compute one token when asked. Where the engine comes
from, and who ends it, is the caller's business.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from kvbm.engine.openai import Bad, Figures, OpenAiServer, Served
from kvbm.engine.settings import EngineSettings
from runtime.discovery import Discovery, Pending
from runtime.drain import drain_asked
from runtime.engine_card import EngineCard
from runtime.instances import Registration
from runtime.lifecycle import Lifecycle, State
from runtime.names import EndpointName, InstanceName
from runtime.tasks import end

DRAIN_LOOK_S: Final = 0.2

_log = structlog.get_logger("kvbm.engine")


@dataclass(frozen=True, slots=True)
class Said:
    """What was said of the engine when it was started; what it says itself goes before."""

    url: str  # that others reach it by
    model: str | None = None
    block_tokens: int = 0
    batch_tokens: int = 0
    context_tokens: int = 0
    dp_size: int = 1
    folder: Path | None = None  # that it was started in


class Life:
    """All calls from one event loop; once through."""

    def __init__(
        self,
        discovery: Discovery,
        endpoint: EndpointName,
        worker_id: int,
        server: OpenAiServer,
        settings: EngineSettings,
        said: Said,
    ) -> None:
        labels = {"url": said.url, "role": settings.role}
        if said.model is not None:
            labels["model"] = said.model
        self.name = InstanceName(endpoint, worker_id)
        self._discovery = discovery
        self._registration = Registration(discovery, self.name, Lifecycle(), said.url, labels)
        self._heeding: asyncio.Task[None] | None = None
        self._server = server
        self._settings = settings
        self._said = said
        self._card: EngineCard | None = None
        self._bad = 0  # looks in a row
        self._away = 0
        self._tokens = math.inf  # computed by then; infinitely many: not known
        self._computed_s = -math.inf  # when it was last proven to compute
        self._waiting_for = ""

    @property
    def state(self) -> State:
        return self._registration.lifecycle.state

    async def begin(self) -> None:
        """Others can see that it is coming, and may ask it to drain."""
        self._told(await self._registration.register())
        self._heeding = asyncio.create_task(self._heed(), name="drain-asked")

    async def watch(self, *, until_away: bool = False) -> None:
        """Look until cancelled, or until nobody has listened there for so many looks."""
        while not until_away or self._away < self._settings.unhealthy_after:
            await self._look()
            await asyncio.sleep(self._settings.health_interval)

    async def drain(self) -> bool:
        """Routers send no more; wait for what is in flight. False: the time was not enough."""
        await self.stopping()
        quiet_s = time.monotonic()
        end_s = quiet_s + self._settings.drain_timeout
        while True:
            found = await self._server.figures()
            now_s = time.monotonic()
            if isinstance(found, Bad):
                _log.warning("drain_blind", instance=str(self.name), why=found.reason)
                return False
            if found.requests:
                quiet_s = now_s
            elif now_s - quiet_s >= self._settings.drain_quiet:
                return True
            if now_s >= end_s:
                _log.warning("drain_late", instance=str(self.name), requests=found.requests)
                return False
            await asyncio.sleep(DRAIN_LOOK_S)

    async def end(self) -> None:
        """Nobody finds it any more. Idempotent."""
        heeding, self._heeding = self._heeding, None
        if heeding is not None:
            await end(heeding)
        if self.state is not State.DEREGISTERED:
            before = self.state
            self._told(await self._registration.deregister())
            _log.info("engine_deregistered", instance=str(self.name), before=before)

    async def stopping(self) -> None:
        """Routers send no more. Idempotent."""
        if self.state is not State.STOPPING:
            await self._move(State.STOPPING)

    async def _heed(self) -> None:
        """Somebody wants it gone: it finishes what it has, and waits for whoever ends it."""
        await drain_asked(self._discovery, self.name)
        _log.info("drain_asked", instance=str(self.name))
        await self.stopping()

    # -- a look ---------------------------------------------------------------------------

    async def _look(self) -> None:
        problem = await self._problem()
        if problem is None:
            self._bad = self._away = 0
            if self.state is State.RUNNING:
                await self._move(State.HEALTHY)
            return
        if self.state is State.STOPPING:
            self._away = self._away + 1 if problem.away else 0
            return
        if self.state is State.REGISTERED:
            if problem.reason != self._waiting_for:
                self._waiting_for = problem.reason
                _log.info("engine_not_yet", instance=str(self.name), why=problem.reason)
            return
        self._bad += 1
        self._away = self._away + 1 if problem.away else 0
        self._computed_s, self._tokens = -math.inf, math.inf  # it has to prove itself again
        if self.state is State.HEALTHY and self._bad >= self._settings.unhealthy_after:
            await self._move(State.RUNNING, why=problem.reason)

    async def _problem(self) -> Bad | None:
        """What is wrong with the engine, if anything is. Makes it `running` when it answers."""
        health = await self._server.health()
        if isinstance(health, Bad) or self.state is State.STOPPING:
            return health if isinstance(health, Bad) else None
        if self._card is None:
            made = await self._made_card()
            if isinstance(made, Bad):
                return made
            if not self._registration.lifecycle.may(State.RUNNING):  # it was asked to drain
                return None
            self._card = made
            await self._move(State.RUNNING, card=made)
        idle_s = self._settings.canary_interval
        if not idle_s or time.monotonic() - self._computed_s < idle_s:
            return None
        return await self._proven(self._card.model)

    async def _proven(self, model: str) -> Bad | None:
        """Whether it has computed something since the last proof, or else does so now.

        A page of metrics costs the engine some milliseconds, so that it is asked for no sooner.
        """
        if not await self._has_computed():
            answer = await self._server.one_token(model, self._settings.canary_timeout)
            if isinstance(answer, Bad):
                return Bad(f"the canary: {answer.reason}", answer.away)
            await self._has_computed()  # this token proves nothing the next time
        self._computed_s = time.monotonic()
        return None

    async def _has_computed(self) -> bool:
        """Since it was last asked for its figures; False if that is not known."""
        before = self._tokens
        figures = await self._server.figures()
        self._tokens = math.inf if isinstance(figures, Bad) else figures.tokens
        return before < self._tokens < math.inf

    async def _made_card(self) -> EngineCard | Bad:
        """What the engine says of itself, else what was said of it, else 0."""
        served = await self._server.served()
        if isinstance(served, Bad):
            if self._said.model is None:
                return served
            served = Served(self._said.model, 0)
        figures = await self._server.figures()
        if isinstance(figures, Bad):
            figures = Figures(0, 0.0, 0, 0, 0)
        said = self._said
        if not (block_tokens := figures.block_tokens or said.block_tokens):
            return Bad("the engine does not tell its block size, nor was it given")
        return EngineCard(
            model=served.model,
            url=said.url,
            block_tokens=block_tokens,
            kv_blocks=figures.kv_blocks,
            batch_tokens=said.batch_tokens,
            context_tokens=served.context_tokens or said.context_tokens,
            dp_size=figures.ranks or said.dp_size,
            role=self._settings.role,
            path=self._located(served.root),
        )

    def _located(self, root: str) -> str:
        """A folder as others find it, wherever they were started."""
        start = self._said.folder
        return str(start / root) if root and start and (start / root).is_dir() else root

    async def _move(
        self, state: State, *, card: EngineCard | None = None, why: str | None = None
    ) -> None:
        before = self.state
        labels = None if card is None else card.labels()
        outcome = await self._registration.move(state, labels)
        facts = {"why": why} if why is not None else labels or {}
        log = _log.warning if why is not None else _log.info
        log("engine_state", instance=str(self.name), state=state, before=before, **facts)
        self._told(outcome)

    def _told(self, outcome: object) -> None:
        if isinstance(outcome, Pending):
            _log.warning("discovery_pending", instance=str(self.name), why=outcome.reason)
