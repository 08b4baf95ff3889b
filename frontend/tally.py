"""How many tokens an engine's answer has brought, when its bytes go through unread.

An engine may say so: in the usage of a whole answer or of a stream's last event, with every event
(`stream_options.continuous_usage_stats`), or by the tokens themselves (`return_token_ids`). Only
what can hold that is decoded. Else a stream's events are counted, and what an event brings is an
estimate: speculative decoding and `--stream-interval` put several tokens into one.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

LINE_BYTES_MAX: Final = 1 << 20
_KEEP: Final = 1 - 1 / 32  # of the past, with each answer
_EVENTS_ASSUMED: Final = 64.0
_EVENT: Final = b"data: {"
_DATA: Final = b"data: "
_MAY_TELL: Final = b"token"  # `completion_tokens`, `output_tokens`, `token_ids`
_LINE_END: Final = 10


class PerEvent:
    """Tokens to an event, by the answers that told; one before any has."""

    def __init__(self) -> None:
        self._tokens = self._events = _EVENTS_ASSUMED

    @property
    def tokens(self) -> float:
        return self._tokens / self._events

    def learn(self, tokens: int, events: int) -> None:
        self._tokens = _KEEP * self._tokens + tokens
        self._events = _KEEP * self._events + events


class Tally:
    """Of one stream, whose first part tells of a first token."""

    __slots__ = (
        "_events",
        "_ids",
        "_is_begun",
        "_per_event",
        "_ratio",
        "_rest",
        "_said",
        "_tokens",
    )

    def __init__(self, per_event: PerEvent) -> None:
        self._per_event = per_event
        self._ratio = per_event.tokens
        self._tokens = 1
        self._events = 0
        self._ids = self._said = 0
        self._is_begun = False
        self._rest = b""

    @property
    def is_told(self) -> bool:
        """The engine says how many there are."""
        return bool(self._said or self._ids)

    def take(self, part: bytes) -> int:
        """How many more there are with this part."""
        if self._rest or part[-1] != _LINE_END:
            part = self._whole_lines(part)
        if not self._is_begun:
            self._is_begun = True
            self._events -= b'"role"' in part  # a chat's first event only says who speaks
        self._events += part.count(_EVENT)
        if _MAY_TELL in part:
            self._read(part)
        tokens = int(self._events * self._ratio)
        if self._ids or self._said:
            tokens = self._ids or max(tokens, self._said)
        more = tokens - self._tokens
        if more <= 0:
            return 0
        self._tokens = tokens
        return more

    def end(self) -> int:
        """How many more there are than the parts gave; fewer than 0 if they gave too many."""
        if not self.is_told:
            return 0
        told = self._said or self._ids
        if self._events > 0:
            self._per_event.learn(told, self._events)
        return told - self._tokens

    def _whole_lines(self, part: bytes) -> bytes:
        part = self._rest + part
        end = part.rfind(b"\n") + 1
        self._rest = part[end:] if len(part) - end <= LINE_BYTES_MAX else b""
        return part[:end]

    def _read(self, part: bytes) -> None:
        for line in part.split(b"\n"):
            if line.startswith(_EVENT) and _MAY_TELL in line:
                event = _decoded(line[len(_DATA) :])
                self._said = max(self._said, event.said)
                self._ids += sum(len(choice.token_ids or ()) for choice in event.choices)
                self._events -= bool(event.said and not event.choices)  # it brings none itself


def told_by(answer: bytes) -> int:
    """Tokens of a whole answer, by its usage; 0 where it has none."""
    return _decoded(answer).said if _MAY_TELL in answer else 0


_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class _Usage(msgspec.Struct):
    completion_tokens: _Count | None = None
    output_tokens: _Count | None = None  # of /v1/responses and /v1/messages


class _Holder(msgspec.Struct):
    usage: _Usage | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Event(msgspec.Struct):
    usage: _Usage | None = None
    response: _Holder | None = None
    choices: list[_Choice] = []

    @property
    def said(self) -> int:
        usage = self.usage or (self.response and self.response.usage)
        return (usage.completion_tokens or usage.output_tokens or 0) if usage else 0


_decoder = msgspec.json.Decoder(_Event)
_NOTHING: Final = _Event()


def _decoded(data: bytes) -> _Event:
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _NOTHING  # its bytes are the client's to judge
