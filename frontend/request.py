"""What of an OpenAI request decides where it goes and what it costs; the rest is the engine's.

The body is decoded once, into the fields named here, and passed on as it came. So a field that is
new or the engine's own works without a word here. Fields that are named are checked: a wrong kind
of value is answered with which field it was and what it has to be.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from frontend.errors import ApiError, bad_request

Content = str | list[dict[str, Any]] | None


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Sampled(msgspec.Struct, kw_only=True):
    """Common to requests that generate."""

    model: str = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    priority: int | None = 0
    cache_salt: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Sampled, kw_only=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    @property
    def output_tokens_max(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None  # of tokens, all alike, or texts
    max_tokens: int | None = 16
    add_special_tokens: bool = True

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_tokens


class PooledRequest(msgspec.Struct, kw_only=True):
    """Embeddings and the like: nothing is generated, nothing is reused."""

    model: str = ""


R = TypeVar("R")

# As msgspec says it: what was expected, and behind " - at `$." where.
_PLACE = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)


def decode(decoder: msgspec.json.Decoder[R], body: bytes) -> R:
    """Raises ApiError: 400 with the field that is wrong."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is no JSON: {error}", code="invalid_json") from error


def _refusal(said: str) -> ApiError:
    match = _PLACE.fullmatch(said)
    assert match is not None  # it matches any text
    what, where = match.groups()
    missing = re.fullmatch(r"Object missing required field `(.+)`", what)
    param = where or (missing and missing[1]) or None
    at = f" in {where!r}" if where else ""
    return bad_request(f"{what}{at}", param, "invalid_value")


chat_decoder = msgspec.json.Decoder(ChatRequest)
completion_decoder = msgspec.json.Decoder(CompletionRequest)
pooled_decoder = msgspec.json.Decoder(PooledRequest)
