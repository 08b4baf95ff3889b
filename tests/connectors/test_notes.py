"""Notes in the scheduler half: equal to what vLLM's own KV events say of the same request."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import EventBatch, ZmqEventPublisher
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.request import Request

from connectors.vllm import notes as notes_module
from connectors.vllm.connector import _noted_group, _routing
from connectors.vllm.notes import RequestNotes
from kvbm.note import Note, domain_of
from kvbm.routing import derived_worker_id, live_endpoint
from kvbm.token_chain import TokenChain
from runtime.events.engine_router import EngineRouter
from runtime.events.engine_wire import decode_engine_batch
from runtime.events.router_event import Stored
from runtime.hashing import sequence_hashes
from tests.connectors.fake_client import FULL, SLIDING, Scheduler, chain

BLOCK = 16
BLOCKS = 12
DOMAIN = 7

init_none_hash(sha256)


def image(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, length))


DIGEST = "5b" * 32
IMAGES = [image("first", 3, 5), image(DIGEST, 14, 40), image("third", 54, 1), image("4th", 160, 9)]
LORA = LoRARequest(lora_name="adapter", lora_int_id=1, lora_path="/nowhere")
KINDS: dict[str, Callable[..., Request]] = {
    "plain": Request,
    "lora": partial(Request, lora_request=LORA),
    "salt": partial(Request, cache_salt="tenant's own"),
    "lora and salt": partial(Request, lora_request=LORA, cache_salt="adapter"),
    "images": partial(Request, mm_features=IMAGES),
    "all": partial(Request, mm_features=IMAGES, lora_request=LORA, cache_salt="s"),
}


def make_request(
    kind: str = "plain", tokens: int = BLOCK * BLOCKS + 5, *, hashed: int = BLOCK
) -> Request:
    source = random.Random(kind)
    return KINDS[kind](
        "request",
        [source.randrange(150_000) for _ in range(tokens)],
        SamplingParams(max_tokens=100),
        None,
        block_hasher=get_request_block_hasher(hashed, sha256),
    )


class Engine:
    """vLLM's own block pool, and its events as the router's."""

    def __init__(self) -> None:
        self._pool = BlockPool(64, True, BLOCK, enable_kv_cache_events=True)
        self._blocks = self._pool.get_new_blocks(32)
        self._router = EngineRouter(BLOCK)
        self._cached = 0

    def cache(self, request: Request, blocks: int) -> np.ndarray:
        """Token hashes of the blocks that became full, as routers hear them."""
        self._pool.cache_full_blocks(request, self._blocks, self._cached, blocks, BLOCK, 0)
        self._cached = blocks
        wire = msgspec.msgpack.encode(EventBatch(0.0, self._pool.take_events(), 0))
        [stored] = self._router.translate(decode_engine_batch(wire))
        assert isinstance(stored, Stored)
        return stored.tokens_hashes


def noted(notes: RequestNotes, start: int, end: int) -> Note:
    notes.hash_to(end * BLOCK)
    return Note.decode(notes.note(DOMAIN, start * BLOCK, end * BLOCK))


@pytest.mark.parametrize("kind", KINDS)
def test_notes_name_blocks_as_the_engines_events_do(kind: str) -> None:
    source = random.Random(1)
    for _ in range(4):
        request, engine = make_request(kind), Engine()
        notes = RequestNotes(request, BLOCK, BLOCK)
        heard = np.empty(0, np.uint64)
        while len(heard) < BLOCKS:
            end = source.randint(len(heard) + 1, BLOCKS)
            own = engine.cache(request, end)
            first, heard = len(heard), np.concatenate([heard, own])
            note = noted(notes, first, end)
            assert note.tokens_hashes.tolist() == own.tolist()
            assert note.domain == DOMAIN
            chained = sequence_hashes(heard)
            assert note.parent == (int(chained[first - 1]) if first else None)
            assert note.chain.tolist() == chained[first:].tolist()


def test_kinds_of_requests_with_the_same_tokens_have_different_notes() -> None:
    seen = set()
    for make in KINDS.values():
        request = make("r", list(range(2 * BLOCK)), SamplingParams(max_tokens=1), None)
        seen.add(tuple(noted(RequestNotes(request, BLOCK, BLOCK), 0, 2).tokens_hashes.tolist()))
    assert len(seen) == len(KINDS)


def test_generated_tokens_are_noted_as_they_come_and_each_is_hashed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[int] = []

    class Counting(TokenChain):
        def extend(self, tokens: list[int], *rest: object) -> None:  # type: ignore[override]
            hashed.append(len(tokens))
            super().extend(tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(notes_module, "TokenChain", Counting)
    request, engine = make_request(tokens=2 * BLOCK + 1), Engine()
    notes = RequestNotes(request, BLOCK, BLOCK)
    heard = engine.cache(request, 2).tolist()
    assert noted(notes, 0, 2).tokens_hashes.tolist() == heard
    for number in range(3 * BLOCK):
        request.append_output_token_ids(number)
    heard += engine.cache(request, 4).tolist() + engine.cache(request, 5).tolist()
    assert noted(notes, 2, 5).tokens_hashes.tolist() == heard[2:]
    assert noted(notes, 0, 5).tokens_hashes.tolist() == heard
    assert hashed == [2 * BLOCK, 3 * BLOCK]


def test_a_block_of_several_of_vllms_hashes_is_noted_whole() -> None:
    """As in hybrid models, where vLLM hashes the greatest common divisor of all groups' blocks."""
    fine = RequestNotes(make_request(hashed=BLOCK // 2), BLOCK, BLOCK // 2)
    whole = RequestNotes(make_request(), BLOCK, BLOCK)
    assert noted(fine, 0, 3).tokens_hashes.tolist() == noted(whole, 0, 3).tokens_hashes.tolist()
    assert noted(fine, 3, 7).tokens_hashes.tolist() == noted(whole, 3, 7).tokens_hashes.tolist()


def test_a_session_that_took_back_tokens_is_hashed_anew() -> None:
    request = make_request()
    notes = RequestNotes(request, BLOCK, BLOCK)
    before = noted(notes, 0, 4).tokens_hashes.tolist()
    # What vLLM does when a streaming session goes on from fewer tokens than it had.
    del request._all_token_ids[3 * BLOCK :]
    del request.block_hashes[3:]
    request.append_output_token_ids(list(range(2 * BLOCK)))
    after = noted(notes, 0, 5).tokens_hashes.tolist()
    fresh = noted(RequestNotes(request, BLOCK, BLOCK), 0, 5).tokens_hashes.tolist()
    assert after == fresh and after[:3] == before[:3] and after[3] != before[3]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda request: setattr(request, "prompt_embeds", object()),
        lambda request: request._all_token_ids.__setitem__(3, -1),
        lambda request: request._all_token_ids.__delitem__(slice(BLOCK, None)),
    ],
    ids=["embeddings", "a number that is no token", "too few"],
)
def test_a_request_whose_tokens_are_not_known_has_no_notes(
    spoil: Callable[[Request], None],
) -> None:
    request = make_request()
    spoil(request)
    notes = RequestNotes(request, BLOCK, BLOCK)
    for end in (2, 4):
        notes.hash_to(end * BLOCK)
        assert notes.note(DOMAIN, 0, end * BLOCK) == b""


def test_only_whole_chunks_of_whole_blocks_have_notes() -> None:
    notes = RequestNotes(make_request(), BLOCK, BLOCK)
    notes.hash_to(5 * BLOCK + 3)
    for start, end in ((0, BLOCK - 1), (1, BLOCK), (-BLOCK, 0), (0, 0), (4 * BLOCK, 6 * BLOCK)):
        assert notes.note(DOMAIN, start, end) == b""
    assert notes.note(DOMAIN, 4 * BLOCK, 5 * BLOCK)


# -- in the manager ---------------------------------------------------------------------


NOTED = replace(FULL, is_noted=True)
A = chain("a", 4)
WINDOW = chain("a", 2, SLIDING)


@pytest.fixture
def noting(idle_scheduler: Scheduler) -> Scheduler:
    """Its full-attention group is the one that routers are told of."""
    idle_scheduler.start([NOTED, SLIDING])
    idle_scheduler.client.come_up()
    idle_scheduler.client.pump()
    idle_scheduler.client.salt, idle_scheduler.client.tag = b"salt", 3
    return idle_scheduler


def commit(scheduler: Scheduler, context: ReqContext, keys: list[OffloadKey]) -> list[bytes]:
    """Store these, and the notes that the daemon is told with them, by position and group."""
    stored, _ = scheduler.store(context, keys)
    scheduler.manager.complete_store(set(stored), context)
    return [filled.note for filled in scheduler.client.committed[-1]]


def test_chunks_of_the_announced_group_are_stored_with_notes(noting: Scheduler) -> None:
    request = make_request(tokens=4 * BLOCK)
    context = noting.request("a", A, WINDOW)
    noting.manager.follow("a", RequestNotes(request, BLOCK, BLOCK))
    whole = TokenChain(BLOCK, lora=None, cache_salt=None)
    whole.extend(list(request.all_token_ids))
    domain = domain_of(noting.namespaces[-1], b"salt", 3)
    notes = [note for note in commit(noting, context, [*A[:2], WINDOW[0]]) if note]
    assert notes == [whole.note(domain, 0, 1), whole.note(domain, 1, 2)]
    assert commit(noting, context, A[2:]) == [whole.note(domain, 2, 3), whole.note(domain, 3, 4)]


def test_after_a_reset_notes_are_of_the_new_key_space(noting: Scheduler) -> None:
    context = noting.request("a", A, WINDOW)
    noting.manager.follow("a", RequestNotes(make_request(), BLOCK, BLOCK))
    [before] = commit(noting, context, A[:1])
    noting.manager.reset_cache()
    noting.client.come_up()
    [after] = commit(noting, context, A[:1])
    one, other = Note.decode(before), Note.decode(after)
    assert one.tokens_hashes.tolist() == other.tokens_hashes.tolist()
    assert one.domain != other.domain == domain_of(noting.manager.namespace, b"salt", 3)


def test_a_request_that_nobody_follows_has_no_notes(noting: Scheduler) -> None:
    context = noting.request("a", A, WINDOW)
    assert commit(noting, context, [*A, *WINDOW]) == [b""] * 6


def test_without_an_announced_group_there_are_no_notes(scheduler: Scheduler) -> None:
    context = scheduler.request("a", A, WINDOW)
    scheduler.manager.follow("a", RequestNotes(make_request(), BLOCK, BLOCK))
    assert commit(scheduler, context, A) == [b""] * 4


# -- what the daemon is told of the engine ----------------------------------------------


def group(index: int, window: int | None) -> Any:
    return SimpleNamespace(
        group_idx=index, sliding_window_size_in_chunks=window, tokens_per_block=BLOCK
    )


@pytest.mark.parametrize(
    ("windows", "noted_index"), [([None], 0), ([4, None, None], 1), ([4, 1], 0)]
)
def test_the_announced_group_is_the_first_with_full_attention(
    windows: list[int | None], noted_index: int
) -> None:
    groups = tuple(group(index, window) for index, window in enumerate(windows))
    config: Any = SimpleNamespace(kv_group_configs=groups)
    assert _noted_group(config).group_idx == noted_index


def vllm_config(engine_id: str = "engine", rank: int = 0, **events: Any) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=rank),
        kv_transfer_config=SimpleNamespace(engine_id=engine_id),
        kv_events_config=KVEventsConfig(**events) if events else None,
    )


def test_routing_says_where_the_events_of_a_rank_are_heard() -> None:
    config = vllm_config(
        "e_dp2",
        2,
        enable_kv_cache_events=True,
        endpoint="tcp://*:5557",
        replay_endpoint="tcp://*:6557",
        topic="kv",
    )
    routing = _routing(config, group(1, None), 0)
    assert routing.events == "tcp://127.0.0.1:5559"
    assert routing.replay == "tcp://127.0.0.1:6559"
    assert (routing.dp_rank, routing.group, routing.block_tokens) == (2, 1, BLOCK)
    assert routing.topic == "kv" and routing.worker_id == derived_worker_id("e")
    assert _routing(config, group(1, None), 77).worker_id == 77


@pytest.mark.parametrize(
    "events",
    [
        {},
        {"enable_kv_cache_events": False},
        {"enable_kv_cache_events": True, "publisher": "null"},
        {"enable_kv_cache_events": True, "endpoint": "inproc://events"},
        {"enable_kv_cache_events": True, "endpoint": "tcp://*:0"},
        {"enable_kv_cache_events": True, "endpoint": "tcp://127.0.0.1:5557"},  # it connects there
    ],
)
def test_an_engine_that_nobody_outside_can_hear_says_so(
    events: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    routing = _routing(vllm_config(**events), group(0, None), 0)
    assert (routing.events, routing.replay, routing.topic) == ("", "", "")
    assert ("cannot hear them" in caplog.text) == ("endpoint" in events)


@pytest.mark.parametrize(
    ("endpoint", "rank", "heard"),
    [
        ("tcp://*:5557", 0, "tcp://127.0.0.1:5557"),
        ("tcp://[::]:5557", 1, "tcp://127.0.0.1:5558"),
        ("ipc:///run/events", 0, "ipc:///run/events"),
        ("ipc:///run/events", 1, ""),
        ("tcp://10.0.0.1:5557", 0, ""),
    ],
)
def test_what_vllm_listens_at_is_heard(endpoint: str, rank: int, heard: str) -> None:
    assert ZmqEventPublisher._is_bind_endpoint(endpoint) >= bool(heard)
    assert live_endpoint(endpoint, rank) == heard
