"""From counters to what happened: one `Observation` for each look at the fleet.

Whoever reads engines and frontends gives a `Snapshot` of counters that only grow and of gauges;
`Observer` takes the differences. A counter that went back is one of a process that was started
anew: what it says is what happened since. Nothing here knows where a snapshot comes from, so that
replay in virtual time and the live loop see the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from runtime.engine_card import Role

Phase = Literal["starting", "serving", "draining"]
Teller = Literal["page", "routers"]


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one engine or frontend since it was started. Tokens, requests and seconds."""

    arrived: float = 0.0  # requests, also those under way
    prompts: float = 0.0  # whose tokens are in `prompt_tokens`
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    cached_tokens: Mapping[str, float] = field(default_factory=dict)  # by tier, of the prompts'
    ttft_s: float = 0.0
    first_tokens: float = 0.0
    itl_s: float = 0.0
    intervals: float = 0.0


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine's node measured, in the terms of `perf.Speed`; 0 where it has not."""

    token_s: float = 0.0
    pair_s: float = 0.0
    load_s: Mapping[str, float] = field(default_factory=dict)  # of a token from each tier


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """`counters` is None where nobody tells of the engine; `teller` is who does."""

    name: str
    role: Role
    phase: Phase
    counters: Counters | None = None
    running: float = 0.0
    waiting: float = 0.0
    kv_used: float = 0.0  # share of its KV blocks
    kv_tokens: int = 0  # that fit into it; 0: not told
    teller: Teller = "page"
    told: Told = Told()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`frontends` by name; where there are none, engines tell what arrives.

    `desired` is how many engines the actuator's other side has been asked for, by whomever.
    """

    at_s: float
    engines: tuple[EngineSnapshot, ...]
    frontends: Mapping[str, Counters] = field(default_factory=dict)
    desired: Mapping[Role, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Traffic:
    """Between two looks. Means are None where nothing was counted."""

    requests: float
    seconds: float
    prompts: float
    prompt_tokens: float | None  # of a prompt, the mean
    output_tokens: float | None
    hits: Mapping[str, float]  # share of prompt tokens found in each tier
    ttft_s: float | None
    itl_s: float | None

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One engine now, and what it did in so many seconds (None: it was not read both times)."""

    name: str
    role: Role
    phase: Phase
    running: float
    waiting: float
    kv_used: float
    kv_tokens: int
    seconds: float | None = None
    computed_tokens: float = 0.0  # of prompts, without those it had
    itl_s: float = 0.0  # the sum of so many
    intervals: float = 0.0
    teller: Teller = "page"
    told: Told = Told()


@dataclass(frozen=True, slots=True)
class Observation:
    """`traffic` is None where nobody could be read: then nothing is known of the load."""

    at_s: float
    traffic: Traffic | None
    engines: tuple[EngineLoad, ...]
    desired: Mapping[Role, int]
    problems: tuple[str, ...] = ()

    def count(self, role: Role, *phases: Phase) -> int:
        return sum(1 for e in self.engines if e.role == role and e.phase in phases)

    def pool(self, role: Role) -> list[EngineLoad]:
        """Engines that serve or are about to."""
        return [e for e in self.engines if e.role == role and e.phase != "draining"]


class Observer:
    """Keeps the last snapshot, no more: what left the fleet is forgotten."""

    def __init__(self) -> None:
        self._last: Snapshot | None = None
        self._known: dict[str, Counters] = {}

    def take(self, snapshot: Snapshot) -> Observation:
        """Snapshots are in the order of time; the first has no traffic."""
        last, self._last = self._last, snapshot
        now: dict[str, Counters] = {
            **{f"frontend {name}": c for name, c in snapshot.frontends.items()},
            **{_key(e): e.counters for e in snapshot.engines if e.counters is not None},
        }
        before, seconds = self._known, 0.0
        if last is not None:
            seconds = snapshot.at_s - last.at_s
            assert seconds > 0, "snapshots must be in the order of time"
        there = {f"frontend {name}" for name in snapshot.frontends}
        there |= {_key(engine) for engine in snapshot.engines}
        # One that cannot be read now goes on where it was when it can be again, unless somebody
        # else has told of it meanwhile: nothing shall count twice.
        self._known = {name: c for name, c in before.items() if name in there} | now
        if last is None:
            return _observation(snapshot, None, {}, seconds)
        # One that is seen for the first time may have counted for days.
        deltas = {name: _since(before[name], c) for name, c in now.items() if name in before}
        engines = [(e.role, deltas[key]) for e in snapshot.engines if (key := _key(e)) in deltas]
        frontends = [d for name, d in deltas.items() if name.startswith("frontend ")]
        traffic = _traffic(engines, frontends, seconds) if deltas else None
        return _observation(snapshot, traffic, deltas, seconds)


def _observation(
    snapshot: Snapshot, traffic: Traffic | None, deltas: Mapping[str, Counters], seconds: float
) -> Observation:
    return Observation(
        snapshot.at_s,
        traffic,
        tuple(_load(engine, deltas.get(_key(engine)), seconds) for engine in snapshot.engines),
        snapshot.desired,
        snapshot.problems,
    )


def _key(engine: EngineSnapshot) -> str:
    return f"{engine.name} by {engine.teller}"


def _load(engine: EngineSnapshot, delta: Counters | None, seconds: float) -> EngineLoad:
    now = engine.name, engine.role, engine.phase, engine.running, engine.waiting
    load = EngineLoad(
        *now, engine.kv_used, engine.kv_tokens, teller=engine.teller, told=engine.told
    )
    if delta is None:
        return load
    computed = max(delta.prompt_tokens - sum(delta.cached_tokens.values()), 0.0)
    return replace(
        load,
        seconds=seconds,
        computed_tokens=computed,
        itl_s=delta.itl_s,
        intervals=delta.intervals,
    )


def _traffic(
    engines: list[tuple[Role, Counters]], frontends: list[Counters], seconds: float
) -> Traffic:
    """Frontends see also what no engine has yet; tokens and hits are the engines' to tell.

    Where prefill and decode are apart each request is seen by both: its prompt is told by who
    computed it, its answer by who gave it.
    """
    everybody = [counters for _, counters in engines]
    prefill = _sum([c for role, c in engines if role != "decode"] or everybody)
    decode = _sum([c for role, c in engines if role != "prefill"] or everybody)
    first = _sum(frontends) if frontends else prefill
    if not (first.arrived or first.first_tokens):
        prefill = Counters()  # no user's prompt: a launcher looks whether the engine computes
    prompt_tokens = prefill.prompt_tokens or first.prompt_tokens
    prompts = prefill.prompts if prefill.prompt_tokens else first.prompts
    return Traffic(
        requests=first.arrived,
        seconds=seconds,
        prompts=prompts,
        prompt_tokens=_mean(prompt_tokens, prompts),
        output_tokens=_mean(decode.output_tokens, decode.prompts) if prompts else None,
        hits={tier: hit / prompt_tokens for tier, hit in prefill.cached_tokens.items()}
        if prompt_tokens
        else {},
        ttft_s=_mean(first.ttft_s, first.first_tokens),
        itl_s=_mean(decode.itl_s, decode.intervals),
    )


def _sum(some: list[Counters]) -> Counters:
    cached: Counter[str] = Counter()
    for one in some:
        for tier, tokens in one.cached_tokens.items():
            cached[tier] += tokens  # type: ignore[assignment]
    return Counters(
        **{name: sum(getattr(one, name) for one in some) for name in _NUMBERS},
        cached_tokens=dict(cached),
    )


_NUMBERS = tuple(name for name in Counters.__dataclass_fields__ if name != "cached_tokens")


def _since(before: Counters, now: Counters) -> Counters:
    """What was counted in between, all of `now` if it began anew."""
    if any(getattr(now, name) < getattr(before, name) for name in ("prompts", "first_tokens")):
        before = Counters()
    return Counters(
        **{name: max(getattr(now, name) - getattr(before, name), 0.0) for name in _NUMBERS},
        cached_tokens={
            tier: max(tokens - before.cached_tokens.get(tier, 0.0), 0.0)
            for tier, tokens in now.cached_tokens.items()
        },
    )


def _mean(total: float, count: float) -> float | None:
    return total / count if count > 0 else None
