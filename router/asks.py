"""What callers ask a router, over HTTP and over the request plane: JSON, checked as it is read.

What cannot be used raises `AskRefused`, which says what and where.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from router.index import WorkerId
from router.model import Part
from router.queue import Urgency
from router.router import Prompt
from router.selector import Wishes
from router.workers import parse_worker
from runtime.hashing import Hashes, block_hashes, seed_for, sequence_hashes

NAME_MAX: Final = 256
WORKERS_MAX: Final = 4096
EVENTS_MAX: Final = 4096
SECONDS_MAX: Final = 86400.0
_TOKEN_MAX: Final = (1 << 32) - 1
_HASH_MAX: Final = (1 << 64) - 1

Name = Annotated[str, Meta(min_length=1, max_length=NAME_MAX)]
Seconds = Annotated[float, Meta(ge=0.0, le=SECONDS_MAX)]
Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Names = Annotated[list[Name], Meta(max_length=WORKERS_MAX)]

T = TypeVar("T")


class AskRefused(ValueError):
    """What was asked makes no sense; says what, where, and what does."""


class RouteAsk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A prompt, by its tokens or by the hashes of its whole blocks, and what it wishes.

    `tokens`: numbers, or base64 of them as little-endian unsigned 32 bit.
    """

    tokens: list[int] | bytes | None = None
    block_hashes: list[int] | None = None  # of each whole block's tokens
    prompt_tokens: Count | None = None  # with `block_hashes`
    model: Name | None = None  # may be left out where there is one
    part: Part = "all"
    request: Name | None = None  # a name for it; else it is given one
    lora: Name | None = None
    cache_namespace: Name | None = None
    priority: Annotated[float, Meta(ge=-SECONDS_MAX, le=SECONDS_MAX)] = 0.0
    strict_priority: Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)] = 0
    expected_output_tokens: Count = 0
    session: Name | None = None
    worker: Name | None = None  # this one or none
    workers: Names | None = None  # one of these
    prefill_worker: Name | None = None
    prefill_workers: Names | None = None
    taints: Names = []
    preferred_taints: dict[Name, Annotated[float, Meta(ge=-100.0, le=100.0)]] = {}
    temperature: Annotated[float, Meta(ge=0.0, le=1e6)] | None = None
    deadline_s: Seconds | None = None  # for waiting
    lease_s: Annotated[float, Meta(gt=0.0, le=SECONDS_MAX)] | None = None


class Happened(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    request: Name
    kind: Literal["prefilled", "first_token", "output", "answered", "end"]
    tokens: Count = 1  # of output or of the answer
    ending: Literal["done", "failed", "cancelled"] = "done"


class EventsAsk(msgspec.Struct, forbid_unknown_fields=True):
    events: Annotated[list[Happened], Meta(max_length=EVENTS_MAX)]


class BusyAsk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Limits that are not named stay as they are; null switches one off.

    The last three are the first three by the reference's names.
    """

    model: Name | None = None
    blocks_fraction: float | msgspec.UnsetType | None = msgspec.UNSET
    prefill_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    prefill_fraction: float | msgspec.UnsetType | None = msgspec.UNSET
    active_decode_blocks_threshold: float | msgspec.UnsetType | None = msgspec.UNSET
    active_prefill_tokens_threshold: int | msgspec.UnsetType | None = msgspec.UNSET
    active_prefill_tokens_threshold_frac: float | msgspec.UnsetType | None = msgspec.UNSET

    def changes(self) -> dict[str, float | int | None]:
        """Names are those of `BusyLimits`."""
        given = {
            "blocks_fraction": (self.active_decode_blocks_threshold, self.blocks_fraction),
            "prefill_tokens": (self.active_prefill_tokens_threshold, self.prefill_tokens),
            "prefill_fraction": (self.active_prefill_tokens_threshold_frac, self.prefill_fraction),
        }
        return {
            name: value
            for name, values in given.items()
            for value in values
            if not isinstance(value, msgspec.UnsetType)
        }


def decode_route(body: bytes) -> RouteAsk:
    """Raises AskRefused."""
    return _decoded(_route, body)


def decode_events(body: bytes) -> EventsAsk:
    """Raises AskRefused."""
    return _decoded(_events, body)


def decode_busy(body: bytes) -> BusyAsk:
    """Raises AskRefused."""
    return _decoded(_busy, body)


def prompt_of(ask: RouteAsk, block_tokens: int) -> Prompt:
    """Raises AskRefused. Costs a pass over the tokens."""
    if (ask.tokens is None) == (ask.block_hashes is None):
        raise AskRefused("give `tokens` or `block_hashes`, and not both - at `$`")
    if ask.tokens is not None:
        tokens = tokens_of(ask.tokens)
        if not len(tokens):
            raise AskRefused("a prompt has at least one token - at `$.tokens`")
        seed = seed_for(ask.lora, ask.cache_namespace)
        hashes = block_hashes(tokens, block_tokens, seed=seed)
        return Prompt(len(tokens), hashes, sequence_hashes(hashes))
    hashes = _hashes(ask.block_hashes or [])
    count = ask.prompt_tokens
    if count is None or not len(hashes) <= count // block_tokens or not count:
        raise AskRefused(
            f"{len(hashes)} blocks of {block_tokens} tokens need at least "
            f"{max(len(hashes) * block_tokens, 1)} - at `$.prompt_tokens`"
        )
    return Prompt(count, hashes, sequence_hashes(hashes))


def wishes_of(ask: RouteAsk) -> Wishes:
    """Of the worker that decodes. Raises AskRefused."""
    return Wishes(
        among=_workers(ask.workers, "workers"),
        taints=frozenset(ask.taints),
        pinned=_worker(ask.worker, "worker"),
        session=ask.session,
        temperature=ask.temperature,
        preferred=ask.preferred_taints,
    )


def prefill_wishes_of(ask: RouteAsk) -> Wishes:
    """Of the worker that computes the prompt. Raises AskRefused."""
    return Wishes(
        among=_workers(ask.prefill_workers, "prefill_workers"),
        taints=frozenset(ask.taints),
        pinned=_worker(ask.prefill_worker, "prefill_worker"),
        session=ask.session,
        temperature=ask.temperature,
        preferred=ask.preferred_taints,
    )


def urgency_of(ask: RouteAsk) -> Urgency:
    return Urgency(ask.priority, ask.strict_priority)


def schemas() -> dict[str, Any]:
    """JSON schemas of what is asked, by name, for an API's description."""
    _, components = msgspec.json.schema_components(
        [RouteAsk, EventsAsk, BusyAsk], ref_template="#/components/schemas/{name}"
    )
    return dict(components)


def _decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AskRefused(str(error) or "no JSON") from error


def tokens_of(given: list[int] | bytes) -> NDArray[np.uint32]:
    if isinstance(given, bytes):
        if len(given) % 4:
            raise AskRefused(f"{len(given)} bytes are no 32-bit numbers - at `$.tokens`")
        return np.frombuffer(given, dtype="<u4")
    try:
        return np.array(given, dtype=np.uint32)
    except (OverflowError, ValueError):
        at = next(n for n, token in enumerate(given) if not 0 <= token <= _TOKEN_MAX)
        raise AskRefused(
            f"{given[at]} is no token; accepted: 0 to {_TOKEN_MAX} - at `$.tokens[{at}]`"
        ) from None


def _hashes(given: list[int]) -> Hashes:
    try:
        return np.array(given, dtype=np.uint64)
    except (OverflowError, ValueError):
        at = next(n for n, one in enumerate(given) if not 0 <= one <= _HASH_MAX)
        raise AskRefused(
            f"{given[at]} is no hash; accepted: 0 to 2^64-1 - at `$.block_hashes[{at}]`"
        ) from None


def _worker(given: str | None, where: str) -> WorkerId | None:
    if given is None:
        return None
    try:
        return parse_worker(given)
    except ValueError as error:
        raise AskRefused(f"{error} - at `$.{where}`") from None


def _workers(given: list[str] | None, where: str) -> frozenset[WorkerId] | None:
    if given is None:
        return None
    found = (_worker(one, f"{where}[{n}]") for n, one in enumerate(given))
    return frozenset(worker for worker in found if worker is not None)


_route = msgspec.json.Decoder(RouteAsk)
_events = msgspec.json.Decoder(EventsAsk)
_busy = msgspec.json.Decoder(BusyAsk)
