"""The engines and frontends there are, read together: one `Snapshot` for each look.

Engines are found in discovery, with what each says of itself: whether it starts, serves or is on
its way out. Their load is read where `Source` says; what routers tell on the event plane completes
it, and stands in for it where an engine cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

from planner.events import Events, Routed
from planner.observe import Counters, EngineSnapshot, Phase, Snapshot
from planner.pages import EnginePage, engine_page, frontend_page
from planner.sources import Source, Unread
from runtime.discovery import Discovery
from runtime.engine_card import COMPONENT, ENDPOINT, CardRefused, EngineCard, Role
from runtime.instances import InstanceRecord, Instances
from runtime.lifecycle import SERVING, State
from runtime.names import EndpointName, InstanceName

PROBLEMS_MAX: Final = 16
_ROLES: Final[tuple[Role, ...]] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Member:
    """An engine as the actuator must know it. `load` is None where it could not be read."""

    name: InstanceName
    record: InstanceRecord
    role: Role
    phase: Phase
    load: EnginePage | None

    @property
    def is_idle(self) -> bool:
        return self.load is not None and self.load.running + self.load.waiting == 0

    @property
    def requests(self) -> float:
        return self.load.running + self.load.waiting if self.load is not None else 0.0


class Fleet:
    def __init__(
        self,
        discovery: Discovery,
        namespace: str,
        model: str | None,
        frontends: Sequence[str],
        source: Source,
        events: Events | None = None,
    ) -> None:
        prefix = EndpointName(namespace, COMPONENT, ENDPOINT).instances_prefix
        self._instances = Instances(discovery, prefix)
        self._model = model
        self._frontends = frontends
        self._source = source
        self._events = events

    @property
    def is_synced(self) -> bool:
        return self._instances.synced.is_set()

    async def start(self) -> None:
        await self._instances.start()

    async def close(self) -> None:
        await self._instances.close()
        await self._source.close()

    async def look(self, at_s: float, desired: Mapping[Role, int]) -> tuple[Snapshot, list[Member]]:
        """`at_s` is when it began, by the caller's clock."""
        records = {
            name: (record, role)
            for name, record in self._instances.known.items()
            if (role := self._role_of(record)) is not None
        }
        urls = [url for record, _ in records.values() if (url := record.labels.get("url"))]
        read = await self._source.read([*urls, *self._frontends])
        problems: list[str] = []
        members: list[Member] = []
        engines: list[EngineSnapshot] = []
        for name, (record, role) in sorted(records.items()):
            phase = _phase(record.state)
            told = read.get(record.labels.get("url", ""), Unread("it has no URL to be read at"))
            page = None
            if isinstance(told, Unread):
                if phase == "serving":
                    problems.append(f"engine {name.id:x}: {told.reason}")
            else:
                page = engine_page(told)
            member = Member(name, record, role, phase, page)
            members.append(member)
            engines.append(self._engine(member))
        frontends: dict[str, Counters] = {}
        for url in self._frontends:
            told = read[url]
            if isinstance(told, Unread):
                problems.append(f"frontend {told.reason}")
            elif (counters := frontend_page(told, self._model)) is None:
                problems.append(f"{url} has no metrics of a frontend")
            else:
                frontends[url] = counters
        if self._events is not None:
            self._events.keep({member.name.id for member in members})
            if (problem := self._events.problem) is not None:
                problems.append(problem)
        told_of = tuple(problems[:PROBLEMS_MAX])
        return Snapshot(at_s, tuple(engines), frontends, desired, told_of), members

    def _engine(self, member: Member) -> EngineSnapshot:
        name, load = f"{member.name.id:x}", member.load
        snapshot = EngineSnapshot(name, member.role, member.phase)
        if load is not None:
            snapshot = EngineSnapshot(
                *(name, member.role, member.phase, load.counters),
                *(load.running, load.waiting, load.kv_used, load.kv_tokens),
            )
        if self._events is None:
            return snapshot
        try:
            card = EngineCard.of_labels(member.record.labels)
        except CardRefused:  # one that starts does not say yet what it is
            return snapshot
        routed = self._events.routed(member.name.id, card)
        if routed is not None:
            snapshot = completed(snapshot, routed, card)
        return replace(snapshot, told=self._events.told(member.name.id, card.block_tokens))

    def _role_of(self, record: InstanceRecord) -> Role | None:
        """None for an engine of another model; one that starts may not say yet whose it is."""
        model = record.labels.get("model", "")
        if self._model is not None and model not in {self._model, ""}:
            return None
        said = record.labels.get("role", "aggregated")
        return next((role for role in _ROLES if role == said), None)


def _phase(state: State) -> Phase:
    if state in SERVING:
        return "serving"
    return "draining" if state in {State.STOPPING, State.DEREGISTERED} else "starting"


def completed(snapshot: EngineSnapshot, routed: Routed, card: EngineCard) -> EngineSnapshot:
    """A page may be some time old: what routers have sent since then is there as well."""
    if snapshot.counters is None:
        return replace(
            snapshot,
            teller="routers",
            counters=routed.counters,
            running=routed.running,
            waiting=routed.waiting,
            kv_used=routed.kv_used,
            kv_tokens=card.kv_blocks * card.block_tokens * card.dp_size,
        )
    more = max(routed.requests - snapshot.running - snapshot.waiting, 0.0)
    wait = min(more, routed.waiting)
    return replace(
        snapshot, running=snapshot.running + more - wait, waiting=snapshot.waiting + wait
    )
