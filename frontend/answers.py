"""OpenAI's answers, made from text: whole, and as a stream's events.

What is the same in all events of a stream is encoded once: an event costs the encoding of its text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

DONE: Final = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


@dataclass(slots=True)
class Choice:
    """What one choice has come to."""

    text: list[str] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int | None = None  # None: the engine did not say

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is not None:
            found["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return found


class Form:
    """The shape of one request's answer: `ChatForm` or `CompletionForm`."""

    _id: str
    _object: str
    _object_streamed: str
    _piece: tuple[bytes, bytes]  # around the text of an event

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": self._id + request_id, "created": int(time.time()), "model": model}
        before, after = self._piece
        self._begin = b"data: " + _encode(self._streamed())[:-1] + b',"choices":[{"index":'
        self._before, self._after = b"," + before, after

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        made = [
            {
                "index": index,
                **self._said("".join(choice.text)),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        head = {**self._head, "object": self._object}
        return _encode({**head, "choices": made, "usage": usage.told()})

    def opening(self, index: int) -> bytes:
        """What a choice's stream begins with; nothing, maybe."""
        return b""

    def piece(self, index: int, text: str) -> bytes:
        number = str(index).encode()
        return b"".join((self._begin, number, self._before, _encode(text), self._after))

    def ending(self, index: int, finish_reason: str) -> bytes:
        return self._event(index, self._said_last(), finish_reason)

    def usage(self, usage: Usage) -> bytes:
        made = _encode({**self._streamed(), "choices": [], "usage": usage.told()})
        return b"data: " + made + b"\n\n"

    def _event(self, index: int, said: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}
        return b"data: " + _encode({**self._streamed(), "choices": [choice]}) + b"\n\n"

    def _streamed(self) -> dict[str, Any]:
        return {**self._head, "object": self._object_streamed}

    def _said(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _said_last(self) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Form):
    _id = "chatcmpl-"
    _object = "chat.completion"
    _object_streamed = "chat.completion.chunk"
    _piece = (b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null}]}\n\n')

    def opening(self, index: int) -> bytes:
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _said_last(self) -> dict[str, Any]:
        return {"delta": {}}


class CompletionForm(Form):
    _id = "cmpl-"
    _object = _object_streamed = "text_completion"
    _piece = (b'"text":', b',"logprobs":null,"finish_reason":null}]}\n\n')

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _said_last(self) -> dict[str, Any]:
        return {"text": ""}
