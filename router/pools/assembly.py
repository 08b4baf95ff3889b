"""The global router put together: pools, relays, and their places among a frontend's engines.

A relay is registered when the first engine of its role and model has been found in any pool, since
before nothing can be said of it; it stays, and refuses requests while no pool can take them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Final

import structlog

from router.model import Engine
from router.pools.decision import DecisionLog
from router.pools.engines import Engines
from router.pools.grid import Strategy
from router.pools.meter import GlobalRouterMetrics
from router.pools.pool import Pool
from router.pools.relay import Relay
from router.pools.settings import PROGRAM, GlobalRouterSettings
from runtime.component import Runtime, Serving
from runtime.discovery import create_discovery
from runtime.discovery.store import Store
from runtime.engine_card import COMPONENT, ENDPOINT, EngineCard, Role
from runtime.engines.upstream import Upstream
from runtime.events import EventPlane, create_event_plane
from runtime.metrics import Samples
from runtime.requests import create_request_plane

MODELS_MAX: Final = 64

_log = structlog.get_logger("kvbm.global_router")


class GlobalAssembly:
    """Called from one event loop. `run` is called once."""

    def __init__(
        self,
        settings: GlobalRouterSettings,
        strategies: tuple[Strategy, ...],
        runtime: Runtime,
        plane: EventPlane,
        metrics: GlobalRouterMetrics,
        upstream: Upstream,
    ) -> None:
        self.settings = settings
        self.strategies = strategies
        self.metrics = metrics
        self.log = DecisionLog(settings.decisions)
        self.relays: dict[tuple[Role, str], Relay] = {}
        self._changed = asyncio.Event()
        names = dict.fromkeys(name for one in strategies for name in one.namespaces)
        self.pools = {
            name: Pool(name, runtime, plane, settings, self._changed.set) for name in names
        }
        self._runtime = runtime
        self._engines = Engines(runtime.client, upstream)
        self._serving: dict[tuple[Role, str], tuple[EngineCard, Serving]] = {}

    async def run(self) -> None:
        """Until cancelled. Raises OSError where a relay has no address."""
        async with asyncio.TaskGroup() as tasks:
            for pool in self.pools.values():
                tasks.create_task(pool.run(), name=f"pool {pool.namespace}")
            tasks.create_task(self._register(), name="relays")

    def readiness(self) -> dict[str, str | None]:
        """By check, why it does not pass."""
        unseen = [pool.namespace for pool in self.pools.values() if not pool.is_listed]
        roles = {role for role, _ in self._serving}
        missing = [one.role for one in self.strategies if one.role not in roles]
        return {
            "discovery": f"not listed yet: {', '.join(unseen)}" if unseen else None,
            "engines": f"no engine yet for {', '.join(missing)}" if missing else None,
        }

    def report(self) -> dict[str, object]:
        """Pools by role, as they are now."""
        models = sorted({model for _, model in self.relays})
        return {
            "models": models,
            "roles": [
                {
                    "role": strategy.role,
                    "retries": strategy.retries,
                    "pools": [
                        {
                            "pool": name,
                            "priority": priority,
                            "router": self.pools[name].router_kind,
                            "running": self.pools[name].in_flight,
                            "engines": {
                                model: len(list(self.pools[name].engines_of(model, strategy.role)))
                                for model in models
                            },
                        }
                        for name, priority in zip(
                            strategy.namespaces, strategy.priorities, strict=True
                        )
                    ],
                }
                for strategy in self.strategies
            ],
        }

    def samples(self) -> Samples:
        """Of all metrics that are read and not counted."""
        pools = self.pools.values()
        kinds = ("found", "own")
        found: Samples = {
            "build_info": {(self.metrics.version, self.metrics.router): 1},
            "ready": {(c,): float(why is None) for c, why in self.readiness().items()},
            "requests_running": {(p.namespace,): p.in_flight for p in pools},
            "pool_engines": {
                (p.namespace,): sum(e.serving for e in p.engines.values()) for p in pools
            },
            "pool_router": {
                (p.namespace, kind): float(p.router_kind == kind) for p in pools for kind in kinds
            },
            "untold_total": {(p.namespace,): p.untold_total for p in pools},
        }
        return {f"kvbm_global_router_{name}": values for name, values in found.items()}

    async def _register(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            for strategy in self.strategies:
                for model, card in self._cards(strategy).items():
                    await self._serve(strategy, model, card)

    def _cards(self, strategy: Strategy) -> dict[str, EngineCard]:
        """What a relay says of itself, by model: what holds for each of its pools' engines."""
        engines: dict[str, list[Engine]] = {}
        for name in strategy.namespaces:
            for model in {e.card.model for e in self.pools[name].engines.values()}:
                if not self.settings.models or model in self.settings.models:
                    found = self.pools[name].engines_of(model, strategy.role)
                    engines.setdefault(model, []).extend(found)
        return {model: _card(model, strategy.role, e) for model, e in engines.items() if e}

    async def _serve(self, strategy: Strategy, model: str, card: EngineCard) -> None:
        key = strategy.role, model
        known = self._serving.get(key)
        if known is not None:
            if known[0] != card:
                await known[1].relabel(card.labels())
                self._serving[key] = card, known[1]
            return
        if len(self.relays) >= MODELS_MAX * len(self.strategies):
            _log.warning("model_left_out", model=model, models_max=MODELS_MAX)
            return
        relay = self.relays[key] = Relay(
            strategy,
            model,
            self.pools,
            self._engines,
            self.settings,
            self.log,
            self.metrics,
        )
        place = self._runtime.namespace(self.settings.events.namespace).component(COMPONENT)
        serving = await place.endpoint(ENDPOINT).serve(relay.generate, labels=card.labels())
        self._serving[key] = card, serving
        _log.info("relay_serves", role=strategy.role, model=model, instance=f"{serving.name.id:x}")


@contextlib.asynccontextmanager
async def running(
    settings: GlobalRouterSettings,
    strategies: tuple[Strategy, ...],
    environ: Mapping[str, str],
    metrics: GlobalRouterMetrics,
    memory: Store | None = None,
) -> AsyncIterator[GlobalAssembly]:
    """A global router with planes of its own, for as long as the context lasts."""
    plane = create_event_plane(settings.events, PROGRAM)
    await plane.start()
    upstream = Upstream(settings.engines.silence, settings.engines.key_text)
    await upstream.open()
    try:
        discovery = create_discovery(settings.discovery, environ, memory)
        requests = create_request_plane(settings.requests, PROGRAM)
        async with asyncio.TaskGroup() as tasks:
            # Pools outlive the runtime: what drains there still needs them.
            async with Runtime(discovery, requests) as runtime:
                assembly = GlobalAssembly(settings, strategies, runtime, plane, metrics, upstream)
                task = tasks.create_task(assembly.run(), name="global router")
                yield assembly
            task.cancel()
    finally:
        await upstream.close()
        await plane.close()


def _card(model: str, role: Role, engines: list[Engine]) -> EngineCard:
    cards = [engine.card for engine in engines]
    return EngineCard(
        model=model,
        url="",
        block_tokens=cards[0].block_tokens,
        context_tokens=min((c.context_tokens for c in cards if c.context_tokens), default=0),
        role=role,
        path=next((card.path for card in cards if card.path), ""),
        relays=True,
    )
