"""Engines in discovery, as they come, change and go.

A record that cannot be used is counted by what is wrong with it, and harms nobody else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from router.model import Engine
from runtime.discovery import Discovery
from runtime.engine_card import COMPONENT, ENDPOINT, CardRefused, EngineCard
from runtime.instances import InstanceRecord, Instances
from runtime.lifecycle import State
from runtime.names import EndpointName, InstanceName

DP_SIZE_MAX: Final = 1024
REFUSALS_KEPT: Final = 16
LABEL_TAINTS: Final = "taints"  # of an engine's record, divided by commas

Why = Literal["record", "card", "model", "block_tokens", "workers"]

_log = structlog.get_logger("router")


@dataclass(frozen=True, slots=True)
class Refusal:
    instance: str
    why: Why
    detail: str


class Refused(Exception):
    """An engine that requests cannot be sent to."""

    def __init__(self, why: Why, detail: str) -> None:
        self.why: Why = why
        super().__init__(detail)


class Fleet:
    """`put` is called with each engine that is there, or has changed, and may raise Refused;
    `remove` with the instance of one that `put` took and that has gone."""

    def __init__(
        self,
        discovery: Discovery,
        namespace: str,
        put: Callable[[Engine], None],
        remove: Callable[[int], None],
    ) -> None:
        prefix = EndpointName(namespace, COMPONENT, ENDPOINT).instances_prefix
        self._instances = Instances(discovery, prefix, self._changed)
        self._put = put
        self._remove = remove
        self._taken: set[int] = set()
        self._refused_total: Counter[Why] = Counter()
        self.latest_refusals: deque[Refusal] = deque(maxlen=REFUSALS_KEPT)

    @property
    def is_synced(self) -> bool:
        """All that was in discovery at first has been seen."""
        return self._instances.synced.is_set()

    @property
    def refused_total(self) -> dict[Why, int]:
        """Records by what was wrong with them."""
        return {**self._refused_total, "record": self._instances.refused_total}

    async def wait_synced(self) -> None:
        await self._instances.synced.wait()

    async def start(self) -> None:
        await self._instances.start()

    async def close(self) -> None:
        await self._instances.close()

    def _changed(self, name: InstanceName, record: InstanceRecord | None) -> None:
        # An engine that is being started is registered before it knows the size of its blocks.
        if record is None or not (record.is_serving or "block_tokens" in record.labels):
            self._drop(name.id)
            return
        try:
            self._put(_engine(name, record))
        except Refused as refused:
            self._drop(name.id)
            self._refused_total[refused.why] += 1
            self.latest_refusals.append(Refusal(f"{name.id:x}", refused.why, str(refused)))
            # Engines of other models are no fault.
            log = _log.info if refused.why == "model" else _log.warning
            log("engine_refused", instance=f"{name.id:x}", why=str(refused))
        else:
            if name.id not in self._taken:
                _log.info("engine_found", instance=f"{name.id:x}", labels=record.labels)
            self._taken.add(name.id)

    def _drop(self, instance: int) -> None:
        if instance in self._taken:
            self._taken.remove(instance)
            self._remove(instance)
            _log.info("engine_gone", instance=f"{instance:x}")


def _engine(name: InstanceName, record: InstanceRecord) -> Engine:
    """Raises Refused."""
    try:
        card = EngineCard.of_labels(record.labels)
    except CardRefused as error:
        raise Refused("card", str(error)) from error
    if card.dp_size > DP_SIZE_MAX or not card.model:
        raise Refused("card", f"dp_size {card.dp_size}, model {card.model!r}")
    taints = record.labels.get(LABEL_TAINTS, "").split(",")
    return Engine(
        name.id,
        card,
        record.transport,
        record.is_serving,
        record.state is State.HEALTHY,
        frozenset(taint.strip() for taint in taints if taint.strip()),
    )
