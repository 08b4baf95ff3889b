"""Tokens in, tokens out over the request plane: what a mock engine's `generate` endpoint speaks.

A msgpack map each way. An answer's items bring one token each; the last says why it is the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Literal

import msgspec

from mocker.realtime import EngineClosed, RealtimeEngine
from mocker.sequence import Record


class Generate(msgspec.Struct, frozen=True):
    token_ids: list[int]
    max_tokens: int


class Generated(msgspec.Struct, frozen=True, omit_defaults=True):
    token_ids: list[int]
    finish_reason: Literal["length"] | None = None
    cached_tokens: int = 0  # with the last item


def decode_generated(data: bytes) -> Generated:
    """Raises msgspec.DecodeError."""
    return _answers.decode(data)


def decode_generate(data: bytes) -> Generate:
    """Raises msgspec.DecodeError."""
    return _requests.decode(data)


def encode_generate(request: Generate) -> bytes:
    return _encoder.encode(request)


class Items:
    """A listener of the engine: encoded items, in a queue as long as the answer."""

    def __init__(self, tokens: int) -> None:
        self.arrived: asyncio.Queue[bytes | None] = asyncio.Queue(tokens + 1)

    def token(self, token: int, record: Record | None) -> None:
        if record is None:
            item = Generated([token])
        else:
            item = Generated([token], "length", sum(record.cached_tokens.values()))
        self.arrived.put_nowait(_encoder.encode(item))

    def closed(self) -> None:
        self.arrived.put_nowait(None)


async def generate(engine: RealtimeEngine, request: Generate) -> AsyncGenerator[bytes, None]:
    """Encoded items of an answer. Raises RequestRefused, EngineClosed."""
    items = Items(request.max_tokens)
    number = engine.ask(request.token_ids, request.max_tokens, items)
    try:
        for _ in range(request.max_tokens):
            item = await items.arrived.get()
            if item is None:
                raise EngineClosed
            yield item
    finally:
        engine.leave(number)


_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Generate)
_answers = msgspec.msgpack.Decoder(Generated)
