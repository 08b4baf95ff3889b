"""The daemon's client as the scheduler half sees it, with the daemon played by the test.

What the daemon says waits until the manager pumps, as with the real client.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, make_offload_key

from connectors.vllm.options import Options
from connectors.vllm.scheduler_side import Group, KvbmManager
from connectors.vllm.transfer import ArenaSlots
from kvbm.client import UNMEASURED, Filled, Lookup
from kvbm.fingerprint import key_of
from kvbm.protocol import HERE, VERSION, Hello, MatchGroup, Outcome, Pace, Ready
from storage_tiers.arena import PAGE, Slot
from storage_tiers.base import Key

LAYOUT = Ready([[0, 4096], [0, 1024]], [8192, 2048])
FULL = Group(index=0, tokens_per_chunk=16, window=0)
SLIDING = Group(index=3, tokens_per_chunk=32, window=2)
"""vLLM's index differs from the group's place where a group is not offloaded."""


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class FakeClient:
    def __init__(
        self,
        path: str,
        hello: Callable[[], Hello],
        lease_targets: Sequence[int],
        *,
        clock: Callable[[], float],
    ) -> None:
        self.path = path
        self.hello = hello
        self.lease_targets = lease_targets
        self._clock = clock
        self._heard: deque[Callable[[], None]] = deque()
        self._tickets = itertools.count(1)
        self._offsets = itertools.count(0, 4 * PAGE)
        self._open: dict[int, Lookup] = {}
        self.connection = 0
        self.epoch = b""
        self.session = 0
        self.salt = b""
        self.tag = 0
        self.layout: Ready | None = None
        self.slots_left = 1000
        # What the manager did.
        self.running: bool | None = None
        self.asked: list[tuple[list[MatchGroup], Lookup]] = []
        self.paces: list[Pace] = []
        self.outcomes: list[Outcome] = []
        self.committed: list[list[Filled]] = []
        self.given_back: list[Slot] = []
        self.loaded: list[tuple[int, int]] = []
        self.unanswered = 0
        self.renewed = 0

    # -- the daemon's part, played by the test -------------------------------------------

    def come_up(self) -> None:
        self._heard.append(self._come_up)

    def go_away(self) -> None:
        self._heard.append(self._forget)

    def answer(
        self, lookup: Lookup, states: Sequence[int], source: int = 2, tokens: int = 0
    ) -> None:
        """Say what is kept; what is HERE gets a slot. `tokens` of it are worth loading."""

        def apply() -> None:
            lookup.answered = True
            lookup.tokens = tokens
            lookup.states[:] = bytes(states)
            for place, state in enumerate(states):
                if state == HERE:
                    lookup.rows[place] = (place, source, *self._new_slot(0))

        self._heard.append(apply)

    def arrive(self, lookup: Lookup, place: int, source: int = 3) -> None:
        def apply() -> None:
            lookup.states[place] = HERE
            lookup.rows[place] = (place, source, *self._new_slot(0))

        self._heard.append(apply)

    @property
    def open_tickets(self) -> set[int]:
        return set(self._open)

    # -- the client's methods ------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.layout is not None

    def start(self) -> None:
        self.running = True

    def close(self) -> None:
        self.running = False

    def renew(self) -> None:
        self.renewed += 1
        self._heard.clear()
        self._forget()

    def pump(self) -> None:
        while self._heard:
            self._heard.popleft()()

    def look_up(
        self,
        groups: Sequence[MatchGroup],
        keys: list[Key],
        request: str = "",
        pace: Pace = UNMEASURED,
    ) -> Lookup | None:
        if not self.ready or not keys:
            return None
        lookup = Lookup(next(self._tickets), keys, bytearray(len(keys)), self._clock())
        self._open[lookup.ticket] = lookup
        self.asked.append((list(groups), lookup))
        self.paces.append(pace)
        return lookup

    def holds(self, lookup: Lookup | None) -> bool:
        return lookup is not None and lookup.ticket in self._open

    def forget(self, lookup: Lookup, outcome: Outcome | None = None) -> None:
        if self._open.pop(lookup.ticket, None) is not None and outcome is not None:
            self.outcomes.append(outcome)

    def note_unanswered(self, asked_at: float) -> None:
        self.unanswered += 1

    def take_slots(self, group: int, count: int) -> list[Slot]:
        taken = min(count, self.slots_left) if self.ready else 0
        self.slots_left -= taken
        return [self._new_slot(group) for _ in range(taken)]

    def commit(self, filled: Sequence[Filled]) -> None:
        self.committed.append(list(filled))

    def give_back(self, slots: Sequence[Slot]) -> None:
        self.given_back += slots

    def report_loaded(self, size: int, failed: int) -> None:
        self.loaded.append((size, failed))

    # -- below ---------------------------------------------------------------------------

    def _come_up(self) -> None:
        self.connection += 1
        self.session += 10
        self.epoch = f"epoch {self.connection}".ljust(16).encode()
        self.layout = LAYOUT

    def _forget(self) -> None:
        self.layout = None
        for lookup in self._open.values():
            lookup.answered = True
            lookup.states = bytearray(len(lookup.keys))
            lookup.rows.clear()
        self._open.clear()

    def _new_slot(self, group: int) -> Slot:
        offset = next(self._offsets)
        return Slot(offset, LAYOUT.lengths[group], offset // PAGE + 1)


@dataclass
class Scheduler:
    """The manager with its fake client, and vLLM's scheduler played by the test."""

    manager: KvbmManager
    clock: Clock
    client: FakeClient = field(init=False)
    namespaces: list[bytes] = field(default_factory=list)

    def start(self, groups: Sequence[Group] = (FULL, SLIDING)) -> None:
        self.manager.start(groups, make_hello, [9] * len(groups), self._next_namespace)
        client = self.manager.client
        assert isinstance(client, FakeClient)
        self.client = client

    def _next_namespace(self) -> bytes:
        self.namespaces.append(f"namespace {len(self.namespaces)}".ljust(32).encode())
        return self.namespaces[-1]

    def request(
        self, name: str, *chains: Sequence[OffloadKey], known: int | None = None
    ) -> ReqContext:
        """A request arrives with its first `known` chunks (all, unless told) in each group."""
        context = ReqContext(name)
        for group, chain in zip((FULL, SLIDING), chains, strict=True):
            for position, key in enumerate(chain):
                context.set_offload_key_position(key, (position + 1) * group.tokens_per_chunk)
        self.manager.on_new_request(context)
        self.manager.open(name, [list(chain)[:known] for chain in chains])
        return context

    @property
    def last_lookup(self) -> Lookup:
        return self.client.asked[-1][1]

    def store(
        self, context: ReqContext, keys: Sequence[OffloadKey]
    ) -> tuple[list[OffloadKey], ArenaSlots]:
        output = self.manager.prepare_store(keys, context)
        assert output.evicted_keys == []
        spec = output.store_spec
        assert isinstance(spec, ArenaSlots)
        assert len(output.keys_to_store) == len(spec.offsets)
        return output.keys_to_store, spec

    def key(self, key: OffloadKey, namespace: int = -1) -> Key:
        """The name the daemon knows the chunk by."""
        return key_of(self.namespaces[namespace], key[:-4], int.from_bytes(key[-4:], "big"))

    def counts(self) -> dict[str, float]:
        """What was counted since the last call, without vLLM's prefix."""
        stats = self.manager.get_stats()
        if stats is None:
            return {}
        return {
            name.removeprefix("vllm:kvbm_") + "".join(f"/{label}" for label in labels): value
            for name, of_labels in stats.data["data"].items()
            for labels, value in of_labels.items()
        }


def make_scheduler(clock: Clock, **options: float) -> Scheduler:
    return Scheduler(KvbmManager(Options(socket="nowhere", **options), clock), clock)  # type: ignore[arg-type]


def make_hello() -> Hello:
    return Hello(VERSION, "scheduler", "engine/0", 0, 2, {}, [], False, 1)


def chain(name: str, count: int, group: Group = FULL) -> list[OffloadKey]:
    """Keys of the chunks of one sequence."""
    hashes = [f"{name} {position}".ljust(32).encode() for position in range(count)]
    return [make_offload_key(block_hash, group.index) for block_hash in hashes]
