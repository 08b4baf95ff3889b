"""Tokens in, tokens out over the request plane: what a mock engine's `generate` endpoint speaks.

A msgpack map each way. An answer is items of one token or more; the last says why it is the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Literal

import msgspec

from mocker.events import Tier
from mocker.realtime import EngineClosed, RealtimeEngine
from mocker.sequence import Record


class Generate(msgspec.Struct, frozen=True):
    token_ids: list[int]
    max_tokens: int


class Generated(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tokens that have come out since the item before."""

    token_ids: list[int]
    finish_reason: Literal["length"] | None = None
    cached_tokens: dict[Tier, int] = {}  # by tier, with the last item


def decode_generated(data: bytes) -> Generated:
    """Raises msgspec.DecodeError."""
    return _answers.decode(data)


def decode_generate(data: bytes) -> Generate:
    """Raises msgspec.DecodeError."""
    return _requests.decode(data)


def encode_generate(request: Generate) -> bytes:
    return _encoder.encode(request)


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
            return Generated(tokens)
        return Generated(tokens, "length", self._record.cached_tokens)


async def generate(engine: RealtimeEngine, request: Generate) -> AsyncGenerator[bytes, None]:
    """Encoded items of an answer. Raises RequestRefused, EngineClosed."""
    tokens = Tokens()
    number = engine.ask(request.token_ids, request.max_tokens, tokens)
    try:
        while True:
            await tokens.arrived.wait()
            if tokens.is_closed:
                raise EngineClosed
            item = tokens.take()
            yield _encoder.encode(item)
            if item.finish_reason is not None:
                return
    finally:
        engine.leave(number)


_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Generate)
_answers = msgspec.msgpack.Decoder(Generated)
