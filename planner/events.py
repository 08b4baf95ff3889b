"""What the event plane tells of engines: what routers sent them, and what their nodes measured.

An engine's own page says more and is believed before this. But a page may be out of reach, or as
old as a Prometheus server's last visit; routers tell each request as it goes out, its first token
and its end. And no page says what a node's daemon has measured: seconds to compute a token, and to
load one from each tier. Requests that went past all routers are not known here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from planner.observe import Counters, Told
from router.index import WorkerId
from router.peers import (
    ASK_AGAIN_S,
    SILENCE_S,
    Ask,
    Begun,
    Change,
    Changes,
    Ended,
    Grew,
    Peers,
    Prefilled,
    ReplicaCounts,
    State,
    decode,
    encode,
    subjects_of,
)
from router.speeds import Speeds
from router.workers import Speed, Worker
from runtime.engine_card import EngineCard
from runtime.events import EventPlane
from runtime.events.base import Message, Subscription
from runtime.events.node_stream import speeds_subject

ANY_TIER: Final = "any"
"""Routers tell how much of a prompt they expect to be there, not in which tier."""
MODELS_MAX: Final = 64
"""Of which routers are heard, each pool of a model being one."""
SEQUENCES_MAX: Final = 1 << 17
ENGINES_MAX: Final = 1 << 14
COUNT_MAX: Final = 1 << 32
"""Blocks or tokens of one request."""
TURN: Final = 256
_LOWER: Final = ("G2", "G3", "G4")
_UNKNOWN: Final = Speed(prefill_s_per_token=0.0, load_s_per_block=(0.0, 0.0, 0.0))

Kind = Literal["heard", "gap", "malformed", "dropped", "refused", "silent"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(slots=True)
class _Sequence:
    instance: int
    prompt: list[int]
    blocks: int
    computed_tokens: float
    began_s: float | None  # None: before it was heard of
    has_token: bool


@dataclass(slots=True)
class _Engine:
    """Its sequences, all ranks together, and what was counted since it was heard of."""

    requests: int = 0
    without_token: int = 0
    blocks: int = 0
    held: Counter[int] = field(default_factory=Counter)  # sequences with each block of a prompt
    arrived: int = 0
    prompts: int = 0
    prompt_blocks: int = 0
    computed_tokens: float = 0.0
    output_blocks: int = 0
    ttft_s: float = 0.0
    first_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Routed:
    """One engine as routers know it."""

    counters: Counters
    running: float
    waiting: float  # the first of those without a token is being computed
    kv_used: float

    @property
    def requests(self) -> float:
        return self.running + self.waiting


class Events:
    """All methods are called from one event loop. `run` is called once."""

    def __init__(
        self, plane: EventPlane, namespace: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plane = plane
        self._namespace = namespace
        self.clock = clock
        self._models: dict[str, _Routers] = {}
        self._engines: dict[int, _Engine] = {}
        self._speeds = Speeds(_NoWorkers())
        self._subscriptions: tuple[Subscription, ...] = ()
        self._counts: Counter[Kind] = Counter()
        self.sequences = 0

    @property
    def problem(self) -> str | None:
        """Why nothing is heard."""
        status = self._plane.status()
        return None if status.connected else f"the event plane: {status.error}"

    @property
    def counts(self) -> dict[Kind, int]:
        found: dict[Kind, int] = {kind: self._counts[kind] for kind in KINDS}
        found["malformed"] += self._speeds.refused_total
        found["dropped"] += sum(one.dropped_total for one in self._subscriptions)
        found["gap"] += sum(one.counts.gaps for one in self._models.values())
        found["silent"] += sum(one.counts.silent for one in self._models.values())
        return found

    async def run(self) -> None:
        """Until cancelled."""
        async with (
            self._plane.subscribe(subjects_of(self._namespace)) as sequences,
            self._plane.subscribe(speeds_subject(self._namespace)) as speeds,
            asyncio.TaskGroup() as tasks,
        ):
            self._subscriptions = sequences, speeds
            tasks.create_task(self._hear_sequences(sequences), name="events of routers")
            tasks.create_task(self._hear_speeds(speeds), name="events of nodes")
            tasks.create_task(self._tick(), name="routers that are silent")

    def routed(self, instance: int, card: EngineCard) -> Routed | None:
        """None while no router is heard; one that was sent nothing has nothing to do."""
        if not any(len(model.peers) for model in self._models.values()):
            return None
        engine = self._engines.get(instance) or _Engine()
        block, room = card.block_tokens, card.kv_blocks * card.dp_size
        prompt_tokens = max(float(engine.prompt_blocks * block), engine.computed_tokens)
        counters = Counters(
            arrived=engine.arrived,
            prompts=engine.prompts,
            prompt_tokens=prompt_tokens,
            output_tokens=engine.output_blocks * block,
            cached_tokens={ANY_TIER: prompt_tokens - engine.computed_tokens},
            ttft_s=engine.ttft_s,
            first_tokens=engine.first_tokens,
        )
        waiting = max(engine.without_token - card.dp_size, 0)
        used = min((len(engine.held) + engine.blocks) / room, 1.0) if room else 0.0
        return Routed(counters, engine.requests - waiting, waiting, used)

    def told(self, instance: int, block_tokens: int) -> Told:
        """What its node measured; 0 and nothing where it has not. Its ranks are alike."""
        found = self._speeds.of(WorkerId(instance), _UNKNOWN)
        each = zip(_LOWER, found.load_s_per_block, strict=True)
        return Told(
            found.prefill_s_per_token,
            found.prefill_s_per_token2,
            {tier: seconds / block_tokens for tier, seconds in each if seconds},
        )

    def keep(self, instances: set[int]) -> None:
        """The engines there are: what others counted is forgotten."""
        for instance in self._engines.keys() - instances:
            if not self._engines[instance].requests:
                del self._engines[instance]

    # -- hearing -----------------------------------------------------------------------------

    async def _hear_sequences(self, messages: Subscription) -> None:
        while batch := await messages.take(TURN):
            for message in batch:
                self._hear(message)
            await asyncio.sleep(0)

    def _hear(self, message: Message) -> None:
        self._counts["heard"] += 1
        model = self._models.get(message.subject)
        if model is None:
            if len(self._models) >= MODELS_MAX:
                self._counts["refused"] += 1
                return
            model = self._models[message.subject] = _Routers(self, message.subject)
        match decode(message.payload):
            case None:
                self._counts["malformed"] += 1
            case Changes() as changes:
                model.peers.follow(changes)
            case State() as state:
                model.peers.take(state)
            case Ask():
                pass

    async def _hear_speeds(self, messages: Subscription) -> None:
        async for message in messages:
            self._counts["heard"] += 1
            self._speeds.hear(message.payload)

    async def _tick(self) -> None:
        while True:
            for subject, model in list(self._models.items()):
                model.peers.tick()
                if not len(model.peers):
                    self._counts["gap"] += model.counts.gaps
                    self._counts["silent"] += model.counts.silent
                    del self._models[subject]
            await asyncio.sleep(ASK_AGAIN_S)

    # -- what routers say --------------------------------------------------------------------

    def ask(self, subject: str, router: str) -> None:
        self._plane.publish(subject, encode(Ask(router)))

    def begin(self, begun: Begun, *, is_new: bool) -> _Sequence | None:
        """None where there is no room for it."""
        if not _is_sane(begun.blocks, begun.prefill_tokens):
            self._counts["malformed"] += 1
            return None
        engine = self._engines.get(begun.instance)
        if self.sequences >= SEQUENCES_MAX or (
            engine is None and len(self._engines) >= ENGINES_MAX
        ):
            self._counts["refused"] += 1
            return None
        if engine is None:
            engine = self._engines[begun.instance] = _Engine()
        self.sequences += 1
        engine.requests += 1
        engine.arrived += is_new
        engine.held.update(begun.prompt)
        engine.blocks += begun.blocks
        # By a router's state, what has nothing to compute has its first token.
        has_token = not is_new and not begun.prefill_tokens
        engine.without_token += not has_token
        return _Sequence(
            *(begun.instance, begun.prompt, begun.blocks, begun.prefill_tokens),
            self.clock() if is_new else None,
            has_token,
        )

    def first_token(self, sequence: _Sequence, *, timed: bool) -> None:
        """Not `timed`: of an answer that came whole, it came some time before."""
        if sequence.has_token:
            return
        sequence.has_token = True
        engine = self._engines[sequence.instance]
        engine.without_token -= 1
        engine.prompts += 1
        engine.prompt_blocks += len(sequence.prompt)
        engine.computed_tokens += sequence.computed_tokens
        if timed and sequence.began_s is not None:
            engine.ttft_s += self.clock() - sequence.began_s
            engine.first_tokens += 1

    def grow(self, sequence: _Sequence, blocks: int) -> None:
        if not _is_sane(blocks):
            self._counts["malformed"] += 1
            return
        engine = self._engines[sequence.instance]
        sequence.blocks += blocks
        engine.blocks += blocks
        engine.output_blocks += blocks

    def end(self, sequence: _Sequence) -> None:
        engine = self._engines[sequence.instance]
        self.sequences -= 1
        engine.requests -= 1
        engine.without_token -= not sequence.has_token
        engine.blocks -= sequence.blocks
        for block in sequence.prompt:
            if engine.held[block] == 1:
                engine.held.pop(block)
            else:
                engine.held[block] -= 1


class _Routers:
    """The routers of one model's pool: a `Listener`."""

    def __init__(self, events: Events, subject: str) -> None:
        self.counts = ReplicaCounts()
        self.peers = Peers(self, self.counts, SILENCE_S, events.clock)
        self._events = events
        self._subject = subject
        self._sequences: dict[tuple[str, str], _Sequence] = {}

    def happened(self, router: str, change: Change) -> None:
        key = router, change.request
        if isinstance(change, Begun):
            self._begin(router, change, is_new=True)
            return
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        match change:
            case Prefilled():
                self._events.first_token(sequence, timed=change.timed)
            case Grew():
                self._events.grow(sequence, change.blocks)
            case Ended():
                self._events.end(self._sequences.pop(key))

    def runs(self, router: str, begun: Begun) -> None:
        self._begin(router, begun, is_new=False)

    def forget(self, router: str, request: str) -> None:
        if (sequence := self._sequences.pop((router, request), None)) is not None:
            self._events.end(sequence)

    def ask(self, router: str) -> None:
        self._events.ask(self._subject, router)

    def _begin(self, router: str, begun: Begun, *, is_new: bool) -> None:
        self.forget(router, begun.request)
        sequence = self._events.begin(begun, is_new=is_new)
        if sequence is not None:
            self._sequences[router, begun.request] = sequence


def _is_sane(*counts: float) -> bool:
    """Of one request; what is no number is not either."""
    return all(0 <= count <= COUNT_MAX for count in counts)


class _NoWorkers:
    """A `Table` of nobody: speeds are only kept."""

    def get(self, worker: WorkerId) -> Worker | None:
        return None

    def change(self, worker: Worker) -> None:
        raise AssertionError("there is nobody")
