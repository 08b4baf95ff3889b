"""A client that measures an OpenAI server as a user would, engine or frontend.

Time to first token is taken by streaming: from sending the request to the first piece of text.
Answers carry token ids, so that equality means equality.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx2

SERVED_NAME = "demo"
REQUEST_TIMEOUT_S = 300.0

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and what it took. `cached_tokens` counts every tier, as the engine reports it."""

    ttft_s: float
    total_s: float
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    worker: str = ""  # INSTANCE.RANK, where a frontend chose it
    expected_cached_tokens: int = 0  # by the frontend, when it chose


class EngineError(Exception):
    """The server refused a request or did not do what it was asked."""


class Client:
    """`check` is asked when the server breaks off: it says so if the server's program has ended."""

    def __init__(
        self,
        name: str,
        url: str,
        check: Callable[[], None] = lambda: None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.url = url
        self._check = check
        self._headers = dict(headers or {})
        self._http = self._connections()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        if self._http.is_closed:
            self._http = self._connections()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, *, timeout_s: float = REQUEST_TIMEOUT_S) -> httpx2.Response:
        return self._http.get(path, timeout=timeout_s)

    def post(self, path: str, body: Any = None) -> httpx2.Response:
        return self._http.post(path, json=body)

    def answers(self, path: str) -> bool:
        """200, and soon."""
        try:
            return self.get(path, timeout_s=2.0).status_code == 200
        except httpx2.TransportError:
            return False

    def complete(self, prompt: str | Sequence[int], *, max_tokens: int = 24, **more: Any) -> Answer:
        """Greedy continuation of exactly `max_tokens` tokens."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **more}
        return self._stream("/v1/completions", body)

    def chat(self, messages: Sequence[Message], *, max_tokens: int = 64, **more: Any) -> Answer:
        """The next turn of a conversation, greedy, ended by the model or by `max_tokens`."""
        return self._stream(
            "/v1/chat/completions", {"messages": list(messages), "max_tokens": max_tokens, **more}
        )

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """What the engine makes of the messages."""
        return self._tokens({"messages": list(messages), "add_generation_prompt": True})

    def tokens_of(self, prompt: str) -> list[int]:
        return self._tokens({"prompt": prompt})

    def _tokens(self, of: dict[str, Any]) -> list[int]:
        response = self.post("/tokenize", {"model": SERVED_NAME, **of})
        tokens: list[int] = response.raise_for_status().json()["tokens"]
        return tokens

    def _connections(self) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url,
            headers=self._headers,
            timeout=REQUEST_TIMEOUT_S,
            trust_env=False,
        )

    def _stream(self, path: str, body: dict[str, Any]) -> Answer:
        request = {
            "model": SERVED_NAME,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **body,
        }
        reader = _AnswerReader()
        try:
            with self._http.stream("POST", path, json=request) as response:
                if response.status_code != 200:
                    reason = response.read().decode(errors="replace")
                    raise EngineError(f"{self.name} answered {response.status_code}: {reason}")
                for event in _events(response.iter_lines()):
                    reader.feed(event)
                return reader.answer(self.name, response.headers)
        except httpx2.TransportError as error:
            self._check()
            raise EngineError(f"{self.name} broke off an answer: {error!r}") from error


class _AnswerReader:
    """Puts one answer together from the events of its stream, by the clock of the reader."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._first_s: float | None = None
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._usage: dict[str, Any] = {}

    def feed(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise EngineError(f"the engine reported {event['error']}")
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices", ()):
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            tokens = choice.get("token_ids") or ()
            if (piece or tokens) and self._first_s is None:
                self._first_s = time.perf_counter()
            self._pieces.append(piece)
            self._tokens.extend(tokens)

    def answer(self, name: str, headers: Mapping[str, str]) -> Answer:
        if self._first_s is None or not self._usage:
            raise EngineError(f"{name} ended an answer without any text")
        details = self._usage.get("prompt_tokens_details") or {}
        return Answer(
            ttft_s=self._first_s - self._start_s,
            total_s=time.perf_counter() - self._start_s,
            text="".join(self._pieces),
            tokens=tuple(self._tokens),
            prompt_tokens=self._usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens") or 0,
            worker=headers.get("x-kvbm-worker", ""),
            expected_cached_tokens=int(headers.get("x-kvbm-cached-tokens", "0")),
        )


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "data" and value != "[DONE]":
            yield json.loads(value)
