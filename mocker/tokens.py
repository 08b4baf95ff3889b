"""Tokens in, tokens out: a mock engine's `generate` endpoint (`runtime.generation`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from mocker.events import Tier
from mocker.realtime import EngineClosed, RealtimeEngine
from mocker.sequence import Record
from runtime.generation import Generate, Generated, GenerationRefused, encode


class MockGenerated(Generated, frozen=True, omit_defaults=True, kw_only=True):
    """Also says of which tiers the cached tokens came; who does not ask reads over it."""

    cached_by_tier: dict[Tier, int] = msgspec.field(default_factory=dict)  # with the last item


def decode_mock_generated(data: bytes) -> MockGenerated:
    """Raises GenerationRefused."""
    try:
        return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GenerationRefused(str(error)) from error


class Tokens:
    """A listener of the engine: what has come out and was not sent yet."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.is_closed = False
        self._tokens: list[int] = []
        self._record: Record | None = None

    def token(self, token: int, record: Record | None) -> None:
        self._tokens.append(token)
        self._record = record
        self.arrived.set()

    def closed(self) -> None:
        self.is_closed = True
        self.arrived.set()

    def take(self) -> Generated:
        self.arrived.clear()
        tokens, self._tokens = self._tokens, []
        if self._record is None:
            return Generated(token_ids=tokens)
        cached = self._record.cached_tokens
        return MockGenerated(
            token_ids=tokens,
            finish_reason="length",
            cached_tokens=sum(cached.values()),
            cached_by_tier=cached,
        )


async def generate(engine: RealtimeEngine, request: Generate) -> AsyncGenerator[bytes, None]:
    """Encoded items of an answer. Raises RequestRefused, EngineClosed."""
    tokens = Tokens()
    number = engine.ask(request.token_ids, request.sampling.max_tokens, tokens)
    try:
        while True:
            await tokens.arrived.wait()
            if tokens.is_closed:
                raise EngineClosed
            item = tokens.take()
            yield encode(item)
            if item.finish_reason is not None:
                return
    finally:
        engine.leave(number)


_answers = msgspec.msgpack.Decoder(MockGenerated)
