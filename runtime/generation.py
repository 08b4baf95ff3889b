"""Tokens in, tokens out: what a program that generates is asked on the request plane, and answers.

The endpoint is `runtime.engine_card.ENDPOINT`; a question is one `Generate`, an answer items of
`Generated`, of which the last says why it is the last. Names and meanings of what governs sampling
are vLLM's, which are OpenAI's where OpenAI has them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Finish = Literal["stop", "length"]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """None: the engine's own choice."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: list[str] = []  # an engine that makes text may end there; who asks looks for them too
    stop_token_ids: list[int] = []
    ignore_eos: bool = False


class Hints(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request says of the pool that it should go to, where there are several."""

    ttft_target_ms: float | None = None  # to the first token
    itl_target_ms: float | None = None  # from one token to the next
    priority: int | None = None


class Generate(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    token_ids: list[int]
    sampling: Sampling
    model: str = ""
    dp_rank: int = 0
    priority: int = 0
    cache_salt: str | None = None
    hints: Hints | None = None  # this and the next are for who hands it on to an engine
    session: str | None = None  # requests of one are best on one engine


class Refused(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why no engine would take the request: `status` is OpenAI's, from 400 to 499."""

    status: int
    message: str
    param: str | None = None


class Generated(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The tokens that have come since the item before."""

    token_ids: list[int]
    finish_reason: Finish | None = None  # in the last item
    stop_token: int | None = None  # that ended it, which is not among the tokens
    cached_tokens: int | None = None  # of the prompt; said once, in any item
    refused: Refused | None = None  # then this is the only item


class EngineRefused(Exception):
    """The request is to blame: no other engine would take it."""

    def __init__(self, refused: Refused) -> None:
        self.refused = refused
        super().__init__(refused.message)


class GenerationRefused(ValueError):
    """Bytes that are no question or answer of this form."""


def encode(message: Generate | Generated) -> bytes:
    return _encoder.encode(message)


def decode_generate(data: bytes) -> Generate:
    """Raises GenerationRefused."""
    try:
        return _questions.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GenerationRefused(str(error)) from error


def decode_generated(data: bytes) -> Generated:
    """Raises GenerationRefused."""
    try:
        return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GenerationRefused(str(error)) from error


_encoder = msgspec.msgpack.Encoder()
_questions = msgspec.msgpack.Decoder(Generate)
_answers = msgspec.msgpack.Decoder(Generated)
