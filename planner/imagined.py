"""The fleet there would be if decisions that are only told were carried out.

A dry run decides with it, so that what it asks for next is what a planner that acts would: a target
that was raised stays until the delay has passed, and engines asked for are on their way. What the
real engines have in flight is spread over the imagined ones, and more of those run more of what
waits. As soon as others change the real fleet, it is that fleet again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.observe import EngineLoad, Observation, Phase
from runtime.engine_card import Role


@dataclass(slots=True)
class _Pool:
    real: int  # engines, or what the other side of the actuator is asked for
    wanted: int
    begun_s: list[float] = field(default_factory=list)  # of those that are not real, in order


class Imagined:
    """`see` and `decided` once a tick, in this order."""

    def __init__(self) -> None:
        self._pools: dict[Role, _Pool] = {}

    def see(self, seen: Observation, roles: Sequence[Role], start_delay_s: float) -> Observation:
        """What would be seen."""
        engines = [engine for engine in seen.engines if engine.role not in roles]
        for role in roles:
            there = seen.pool(role)
            real = seen.desired.get(role, len(there))
            pool = self._pools.get(role)
            if pool is None or pool.real != real:
                coming = [seen.at_s] * max(real - len(there), 0)
                pool = self._pools[role] = _Pool(real, real, coming)
            engines += _imagined(pool, role, there, seen.at_s - start_delay_s)
        return replace(seen, engines=tuple(engines), desired={})

    def decided(self, at_s: float, targets: Mapping[Role, int]) -> None:
        for role, target in targets.items():
            pool = self._pools[role]
            more = target - pool.wanted
            # The last to come go first.
            pool.begun_s = pool.begun_s[: max(len(pool.begun_s) + more, 0)] + [at_s] * more
            pool.wanted = target

    def forget(self) -> None:
        self._pools.clear()


def _imagined(
    pool: _Pool, role: Role, there: list[EngineLoad], serves_since_s: float
) -> list[EngineLoad]:
    if pool.wanted == len(there) and not pool.begun_s:
        return there
    there = sorted(there, key=lambda engine: engine.phase == "starting")
    engines = there[: pool.wanted - len(pool.begun_s)]
    kv_tokens = max((engine.kv_tokens for engine in there), default=0)
    for number in range(pool.wanted - len(engines)):
        serves = number < len(pool.begun_s) and pool.begun_s[number] <= serves_since_s
        phase: Phase = "serving" if serves else "starting"
        engines.append(EngineLoad(f"imagined {number}", role, phase, 0.0, 0.0, 0.0, kv_tokens))
    return _spread(there, engines)


def _spread(there: list[EngineLoad], engines: list[EngineLoad]) -> list[EngineLoad]:
    """What is in flight, evenly over those that serve."""
    before = sum(engine.phase == "serving" for engine in there)
    after = sum(engine.phase == "serving" for engine in engines)
    if not before or not after:
        return engines
    running, waiting = sum(e.running for e in there), sum(e.waiting for e in there)
    taken = min(waiting, running * max(after / before - 1, 0.0))
    kv_used = min(sum(e.kv_used for e in there) / after, 1.0)
    running, waiting = (running + taken) / after, (waiting - taken) / after
    return [
        replace(e, running=running, waiting=waiting, kv_used=kv_used) if e.phase == "serving" else e
        for e in engines
    ]
