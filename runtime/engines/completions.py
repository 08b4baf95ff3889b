"""Engines that take tokens through their OpenAI server, as vLLM's does: `/v1/completions`.

A prompt may be tokens there, and `return_token_ids` gives back those that come, in a stream. vLLM
has an endpoint of its own for this, `/inference/v1/generate`. It is not used: a server offers it
only when started with `--enable-scale-out`, and it leaves out what the model's
`generation_config.json` says of sampling, so that requests which say nothing of it would be
answered differently than by the engine itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final

import msgspec

from runtime.engines.upstream import Address, EngineFault, Upstream, to_rank
from runtime.generation import EngineRefused, Finish, Generate, Generated, Refused

PATH: Final = b"/v1/completions"
EVENT_BYTES_MAX: Final = 64 << 20  # the first one repeats the prompt
_DATA: Final = b"data: "
_DONE: Final = b"data: [DONE]"
_FINISHES: Final[dict[str, Finish]] = {"stop": "stop", "length": "length"}


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # a text, if that was what ended it


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str = ""
    param: str | None = None
    code: int | str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class CompletionEngines:
    """Called from one event loop, the upstream's."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def generate(
        self, place: Address, request: Generate, headers: Mapping[str, str]
    ) -> AsyncGenerator[Sequence[Generated]]:
        """Items, as many at a time as have come. Closing the iterator ends the work.

        Raises EngineFault or EngineRefused.
        """
        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        given = to_rank(place, [*given, (b"content-type", b"application/json")])
        stream = _Stream(place)
        try:
            with await self._upstream.send(
                b"POST", place.url, PATH, given, _body(request)
            ) as answer:
                if not answer.is_stream:
                    raise _refusal(place, answer.status, await answer.read())
                while part := await answer.part():
                    if items := stream.take(part):
                        yield items
                    if stream.error is not None:
                        raise stream.error
        except EngineFault:
            if stream.last is None:  # or else nothing is missing
                raise
        if stream.last is not None:
            yield [stream.last]


class _Stream:
    """What has come of one answer."""

    def __init__(self, place: Address) -> None:
        self.last: Generated | None = None  # kept back: what it had cached is said behind it
        self.error: EngineRefused | EngineFault | None = None
        self._place = place
        self._rest = b""

    def take(self, part: bytes) -> list[Generated]:
        """What is new, up to where `error` befell it."""
        *events, self._rest = (self._rest + part).split(b"\n\n")
        items: list[Generated] = []
        try:
            for event in events:
                if event.startswith(_DATA) and event != _DONE:  # or else it is a comment
                    items += self._items(event[len(_DATA) :])
            if len(self._rest) > EVENT_BYTES_MAX:
                raise EngineFault(self._place.url, "an event without an end", begun=True)
        except (EngineRefused, EngineFault) as error:
            self.error = error
        return items

    def _items(self, data: bytes) -> list[Generated]:
        """Raises EngineRefused or EngineFault."""
        try:
            event = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EngineFault(self._place.url, f"no event of ours: {error}", begun=True) from error
        if event.error is not None:
            raise _failure(self._place, event.error)
        if event.usage is not None and self.last is not None:
            self.last = msgspec.structs.replace(self.last, cached_tokens=_cached(event.usage))
        items = [_generated(self._place, choice) for choice in event.choices]
        if items and items[-1].finish_reason is not None:
            self.last = items.pop()
        return [item for item in items if item.token_ids]


def _body(request: Generate) -> bytes:
    asked: dict[str, Any] = msgspec.to_builtins(request)
    sampling = asked.pop("sampling")
    for not_its in ("dp_rank", "hints", "session"):
        asked.pop(not_its, None)
    more = {
        "prompt": asked.pop("token_ids"),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return msgspec.json.encode({**asked, **sampling, **more})


def _generated(place: Address, choice: _Choice) -> Generated:
    """Raises EngineFault if the engine gave up, as one does that is told to stop."""
    ids = choice.token_ids
    if ids is None:
        raise EngineFault(place.url, "it does not say its tokens, as vLLM does", begun=True)
    if choice.finish_reason is None:
        return Generated(token_ids=ids)
    finish = _FINISHES.get(choice.finish_reason)
    if finish is None:
        why = f"it ended the answer with {choice.finish_reason!r}"
        raise EngineFault(place.url, why, begun=True)
    if finish == "stop" and ids and not isinstance(choice.stop_reason, str):
        return Generated(token_ids=ids[:-1], finish_reason=finish, stop_token=ids[-1])
    return Generated(token_ids=ids, finish_reason=finish)


def _cached(usage: _Usage) -> int | None:
    details = usage.prompt_tokens_details
    return None if details is None else details.cached_tokens


def _refusal(place: Address, status: int, body: bytes) -> EngineRefused | EngineFault:
    try:
        error = _decoder.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = None
    told = error or _Error(body[:200].decode(errors="replace"))
    return _failure(place, _Error(told.message, told.param, status))


def _failure(place: Address, error: _Error) -> EngineRefused | EngineFault:
    """What the request is to blame for is its answer; all else is for another engine to try."""
    status = error.code if isinstance(error.code, int) else 500
    if 400 <= status < 500:
        return EngineRefused(Refused(status, error.message, error.param))
    return EngineFault(place.url, f"{status}: {error.message}", begun=True)


_decoder = msgspec.json.Decoder(_Event)
