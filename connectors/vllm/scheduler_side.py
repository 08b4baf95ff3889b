"""The connector's half in vLLM's scheduler: an `OffloadingManager` in front of the daemon.

Everything here runs in the scheduler loop and returns at once. When a request arrives, its keys go
to the daemon in one message (`open`); lookups are answered from what has come back by then. What a
lookup may say: HIT (in host memory, held for this request), MISS, or "ask again" until a deadline,
after which whatever has arrived is used.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from connectors.vllm import stats
from connectors.vllm.notes import RequestNotes
from connectors.vllm.options import Options
from connectors.vllm.steps import StepTimer
from connectors.vllm.transfer import ArenaSlots
from kvbm.client import Filled, Lookup, SchedulerClient
from kvbm.fingerprint import key_of
from kvbm.note import domain_of
from kvbm.pace import EnginePace
from kvbm.protocol import COMING, HERE, PRESENT, Hello, Late, MatchGroup, Outcome, State
from storage_tiers.arena import Slot
from storage_tiers.base import Key

WAIT_S_MIN: Final = 0.02
"""Waited for the daemon however quickly the engine computes: its answer takes a millisecond, and
a hiccup must not cost hits."""

logger = logging.getLogger("kvbm.scheduler")


@dataclass(frozen=True, slots=True)
class Group:
    """An offloaded cache group."""

    index: int  # vLLM's, part of its offload keys
    tokens_per_chunk: int
    window: int  # chunks; 0: full attention
    is_noted: bool = False  # its chunks get notes; one group at most


@dataclass(slots=True)
class _Request:
    """What is known of one request. `places` is its lookup's index of each key asked for."""

    chains: list[dict[int, Key]]  # by group: position -> key
    places: dict[OffloadKey, int] = field(default_factory=dict)
    lookup: Lookup | None = None
    waiting: Late = ""  # for what, and until when
    give_up_at: float = 0.0
    late: Late = ""  # its deadline passed: pending chunks count as missing
    wanted_at: float | None = None  # when vLLM first asked for a chunk, and could have started
    scheduled_at: float | None = None
    local_tokens: int = 0  # that the engine had itself when it was scheduled
    loaded_tokens: int = 0
    load_bytes: int = 0
    must_compute: bool = False  # a load of it failed: it is not given another one
    stored: set[OffloadKey] = field(default_factory=set)
    notes: RequestNotes | None = None
    loading: dict[OffloadKey, int] = field(default_factory=dict)  # -> source


@dataclass(slots=True)
class _Storing:
    transfer: int
    connection: int
    filled: Filled


class KvbmManager(OffloadingManager):
    """Created by the spec, started by the connector, which knows the engine."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self._clock = clock
        self._client: SchedulerClient | None = None
        self._groups: tuple[Group, ...] = ()
        self._position: dict[int, int] = {}  # vLLM's group index -> place in `_groups`
        self._namespace = b""
        self._requests: dict[str, _Request] = {}
        self._storing: dict[OffloadKey, _Storing] = {}
        self._failed: set[int] = set()  # transfers whose store failed in some worker
        self._transfers = itertools.count(1)
        self._tally = stats.Tally()
        self.pace = EnginePace(clock)
        self.steps = StepTimer(self.pace, clock)
        self._renew_namespace: Callable[[], bytes] = bytes

    def start(
        self,
        groups: Sequence[Group],
        hello: Callable[[], Hello],
        lease_targets: Sequence[int],
        namespace: Callable[[], bytes],
    ) -> None:
        """Connect. `namespace` makes the engine's key space, anew at each call but the first."""
        self._groups = tuple(groups)
        self._position = {group.index: place for place, group in enumerate(groups)}
        self._renew_namespace = namespace
        self._namespace = namespace()
        self._client = SchedulerClient(self.options.socket, hello, lease_targets, clock=self._clock)
        self._client.start()

    @property
    def client(self) -> SchedulerClient:
        assert self._client is not None, "start first"
        return self._client

    @property
    def namespace(self) -> bytes:
        """The engine's key space as it is now."""
        return self._namespace

    # -- requests ------------------------------------------------------------------------

    def open(self, req_id: str, keys: Sequence[Sequence[OffloadKey]]) -> None:
        """Ask for a request's chunks, by group in `_groups` order. Replaces an earlier asking.

        Nothing is asked for a request whose load failed: it is computed.
        """
        self.client.pump()
        self.release(req_id)
        known = self._requests.get(req_id)
        if known is not None and known.must_compute:
            return
        chains = [
            {position: self._key_of(key) for position, key in enumerate(group_keys)}
            for group_keys in keys
        ]
        request = self._requests.setdefault(req_id, _Request(chains))
        request.chains = chains
        request.places = {key: i for i, key in enumerate(itertools.chain.from_iterable(keys))}
        request.late = request.waiting = ""
        request.wanted_at = request.scheduled_at = None
        request.local_tokens = request.loaded_tokens = 0
        message = [
            MatchGroup(group.tokens_per_chunk, group.window, b"".join(chain.values()))
            for group, chain in zip(self._groups, chains, strict=True)
        ]
        wanted = [key for chain in chains for key in chain.values()]
        request.lookup = self.client.look_up(message, wanted, req_id, self.pace.now())

    def follow(self, req_id: str, notes: RequestNotes) -> None:
        """Where notes of this request's chunks come from; without it they have none."""
        if (request := self._requests.get(req_id)) is not None:
            request.notes = notes

    def release(self, req_id: str, *, failed: bool = False) -> None:
        """The request holds no chunk any more (it will load none, or has loaded them)."""
        request = self._requests.get(req_id)
        if request is not None and self.client.holds(request.lookup):
            assert request.lookup is not None
            self.client.forget(request.lookup, self._outcome(request, request.lookup, failed))

    def note_local_hit(self, req_id: str, tokens: int) -> None:
        """vLLM is about to look up the chunks behind these tokens, which the engine has."""
        if (request := self._requests.get(req_id)) is not None:
            request.local_tokens = tokens

    def note_scheduled(self, req_id: str, loaded_tokens: int) -> None:
        """vLLM starts the request, and will load this much of it."""
        if (request := self._requests.get(req_id)) is not None:
            request.loaded_tokens = loaded_tokens
            request.scheduled_at = self._clock()

    def _outcome(self, request: _Request, lookup: Lookup, failed: bool) -> Outcome:
        now = self._clock()
        started = request.scheduled_at
        state: State = "loaded" if request.loaded_tokens else "computed"
        if failed:
            state = "failed"
        elif started is None:
            state = "ended"
        return Outcome(
            ticket=lookup.ticket,
            state=state,
            local_tokens=request.local_tokens,
            loaded_tokens=request.loaded_tokens,
            waited_s=(now if started is None else started) - lookup.asked_at,
            load_s=now - started if started is not None and request.loaded_tokens else 0.0,
            late=request.late,
        )

    def is_open(self, req_id: str) -> bool:
        """Whether the request's lookup still stands: asked, and neither released nor cut off."""
        request = self._requests.get(req_id)
        return request is not None and self.client.holds(request.lookup)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._requests.setdefault(req_context.req_id, _Request([{} for _ in self._groups]))
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self.release(req_context.req_id)
        self._requests.pop(req_context.req_id, None)

    # -- lookup and load -----------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        self.client.pump()
        request = self._requests.get(req_context.req_id)
        place = request.places.get(key) if request is not None else None
        lookup = request.lookup if request is not None else None
        if request is None or place is None or lookup is None or not self.client.holds(lookup):
            return LookupResult.MISS
        if request.wanted_at is None:
            request.wanted_at = self._clock()
        if not lookup.answered:
            return LookupResult.MISS if self._is_late(request, "answer") else LookupResult.RETRY
        state = lookup.states[place]
        if state == COMING and not self._is_late(request, "onboard"):
            return LookupResult.HIT_PENDING
        return LookupResult.HIT if state == HERE else LookupResult.MISS

    def _is_late(self, request: _Request, wait: Late) -> bool:
        """Whether the request goes on with what is there."""
        if request.late:
            return True
        if request.waiting != wait:
            request.waiting, request.give_up_at = wait, self._give_up_at(request, wait)
        if self._clock() <= request.give_up_at:
            return False
        assert request.lookup is not None
        request.late = wait
        self._tally.add(stats.DEADLINES, 1, wait)
        if not request.lookup.answered:
            self.client.note_unanswered(request.lookup.asked_at)
        return True

    def _give_up_at(self, request: _Request, wait: Late) -> float:
        """The deadline that was set; sooner if what is waited for takes less time to compute.

        That time runs from when vLLM could have started the request.
        """
        lookup, pace = request.lookup, self.pace.now()
        assert lookup is not None and request.wanted_at is not None
        if wait == "answer":
            limit_s, tokens = self.options.match_deadline_s, _tokens(self._groups, request)
        else:
            limit_s, tokens = self.options.onboard_deadline_s, lookup.tokens
        end = lookup.asked_at + limit_s
        layout = self.client.layout
        if not pace.is_measured or layout is None or layout.always_load:
            return end
        worth_s = max(pace.prefill_s(request.local_tokens, tokens), WAIT_S_MIN)
        return min(end, request.wanted_at + worth_s)

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        request = self._requests.get(req_context.req_id)
        source = request.loading.get(key, 0) if request is not None else 0
        return stats.HIT_SOURCES.get(source, CacheHitSource.EXTERNAL_UNSPECIFIED)

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> ArenaSlots:
        request = self._requests.get(req_context.req_id)
        spec = self._new_transfer(req_context.req_id)
        if request is None:
            return spec  # no slots: the worker sees that they do not match the blocks
        request.loading = {}
        request.load_bytes = 0
        for key in keys:
            found = self._slot_of(request, key)
            if found is None:
                logger.warning("request %s: a chunk was lost before its load", req_context.req_id)
                continue
            slot, source = found
            request.load_bytes += slot.length
            self._add_slot(spec, key, slot)
            request.loading[key] = source
        return spec

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        request = self._requests.get(req_context.req_id)
        if request is not None:
            for source in request.loading.values():
                self._tally.loaded(source, 1)
            if request.loading and request.scheduled_at is not None:
                self.pace.note_load(request.load_bytes, self._clock() - request.scheduled_at)
        self.release(req_context.req_id)

    def _slot_of(self, request: _Request, key: OffloadKey) -> tuple[Slot, int] | None:
        place = request.places.get(key)
        if place is None or request.lookup is None:
            return None
        return request.lookup.slot(place)

    # -- store ---------------------------------------------------------------------------

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput:
        self.client.pump()
        spec = self._new_transfer(req_context.req_id)
        request = self._requests.get(req_context.req_id)
        accepted: list[OffloadKey] = []
        if request is None or not self.client.ready:
            self._tally.add(stats.UNSTORED_CHUNKS, len(keys), "no_daemon")
            return PrepareStoreOutput(accepted, spec, [])
        wanted = [key for key in keys if not self._is_kept(request, key)]
        for place, group in enumerate(self._groups):
            of_group = [key for key in wanted if get_offload_group_idx(key) == group.index]
            slots = self.client.take_slots(place, len(of_group))
            ends = [req_context.get_offload_key_position(key) or 0 for key in of_group]
            if group.is_noted and request.notes is not None:
                request.notes.hash_to(max(ends[: len(slots)], default=0))
            for key, end, slot in zip(of_group, ends, slots, strict=False):
                filled = self._describe(request, key, place, end, slot)
                self._storing[key] = _Storing(spec.transfer, self.client.connection, filled)
                self._add_slot(spec, key, slot)
                accepted.append(key)
        self._tally.add(stats.UNSTORED_CHUNKS, len(wanted) - len(accepted), "no_slot")
        return PrepareStoreOutput(accepted, spec, [])

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        done: list[Filled] = []
        failed: list[Slot] = []
        request = self._requests.get(req_context.req_id)
        for key in keys:
            storing = self._storing.pop(key, None)
            # Slots of an earlier connection went back to the daemon when that ended.
            if storing is None or storing.connection != self.client.connection:
                continue
            if success and storing.transfer not in self._failed:
                done.append(storing.filled)
                if request is not None:
                    request.stored.add(key)
            else:
                failed.append(storing.filled.slot)
        if done:
            done.sort(key=lambda filled: filled.position)
            self.client.commit(done)
        self.client.give_back(failed)
        self._tally.add(stats.STORED_CHUNKS, len(done))
        self._tally.add(stats.UNSTORED_CHUNKS, len(failed), "failed")
        self._failed &= {storing.transfer for storing in self._storing.values()}

    def note_worker_results(
        self, failed_stores: set[int], loaded_bytes: int, failed_loads: set[str]
    ) -> None:
        """What the workers reported; before vLLM completes the jobs it is about."""
        self._failed |= failed_stores
        for req_id in failed_loads:
            if (request := self._requests.get(req_id)) is not None:
                # What made one load fail may be there to stay, and vLLM tries again for ever.
                request.must_compute = True
                request.loading = {}
                self.release(req_id, failed=True)
        self._tally.add(stats.LOAD_FAILURES, len(failed_loads))
        if loaded_bytes or failed_loads:
            self.client.report_loaded(loaded_bytes, len(failed_loads))

    def _is_kept(self, request: _Request, key: OffloadKey) -> bool:
        """Whether there is no need to store the key: it is kept, or being stored.

        What was still coming from a lower tier when the request went on without it may never
        come, and this request has computed it: storing it again costs one copy.
        """
        if key in self._storing or key in request.stored:
            return True
        if request.must_compute:
            return False
        place = request.places.get(key)
        if place is None or request.lookup is None:
            return False
        return request.lookup.states[place] in {HERE, PRESENT}

    def _describe(
        self, request: _Request, key: OffloadKey, place: int, end: int, slot: Slot
    ) -> Filled:
        group = self._groups[place]
        position = (end // group.tokens_per_chunk - 1) if end else 0
        chain = request.chains[place]
        name = self._key_of(key)
        chain[position] = name
        note = b""
        if group.is_noted and request.notes is not None:
            note = request.notes.note(self._domain, end - group.tokens_per_chunk, end)
        return Filled(name, chain.get(position - 1), position, slot, note)

    @property
    def _domain(self) -> int:
        return domain_of(self._namespace, self.client.salt, self.client.tag)

    def _key_of(self, key: OffloadKey) -> Key:
        return key_of(
            self._namespace,
            get_offload_block_hash(key),
            get_offload_group_idx(key),
            salt=self.client.salt,
            tag=self.client.tag,
        )

    # -- the rest of the seam ------------------------------------------------------------

    def reset_cache(self) -> None:
        """Never again use what was stored so far: start an empty key space of this engine's own.

        vLLM calls this after its weights changed, so sharing with engines that have not changed
        theirs, or in another way, would be wrong. The connection is renewed as well, because
        copies of before the reset may still be on their way.
        """
        self._namespace = self._renew_namespace()
        self._storing.clear()
        self._failed.clear()
        for request in self._requests.values():
            request.lookup = None
            request.stored.clear()
            request.places.clear()
            request.chains = [{} for _ in self._groups]
        self.client.renew()

    def get_stats(self) -> OffloadingConnectorStats | None:
        self.client.pump()
        return self._tally.take(connected=self.client.ready)

    def shutdown(self) -> None:
        if self._client is not None:
            self._client.close()

    def _new_transfer(self, req_id: str) -> ArenaSlots:
        client, layout = self.client, self.client.layout
        return ArenaSlots(
            transfer=next(self._transfers),
            request=req_id,
            epoch=client.epoch,
            session=client.session,
            lengths=list(layout.lengths) if layout else [],
            rank_offsets=list(layout.rank_offsets) if layout else [],
        )

    def _add_slot(self, spec: ArenaSlots, key: OffloadKey, slot: Slot) -> None:
        spec.offsets.append(slot.offset)
        spec.generations.append(slot.generation)
        spec.groups.append(self._position[get_offload_group_idx(key)])


def _tokens(groups: Sequence[Group], request: _Request) -> int:
    """Of the request's whole chunks, in the group that asked for most."""
    counts = (
        group.tokens_per_chunk * len(chain)
        for group, chain in zip(groups, request.chains, strict=True)
    )
    return max(counts, default=0)
