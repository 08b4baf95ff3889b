"""OpenAI's API in front of a mock engine: completions and chat, whole or streamed, made-up text.

An answer is a listener of the engine that writes to its connection, so that a streamed event costs
some microseconds. Fields of requests that change nothing here are accepted and ignored, as engines
do; those that would make an answer wrong (`n`, several prompts) are refused.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from mocker.gauges import Gauges
from mocker.http import JSON, HttpRequest, Reply, chunked
from mocker.realtime import EngineClosed, RealtimeEngine, RequestRefused
from mocker.sequence import Record
from mocker.text import TEXTS, VOCABULARY, conversation, text_of, tokens_of

ANSWER_TOKENS: Final = 128  # where a request does not say: there is no model that might stop
DONE: Final = chunked(b"data: [DONE]\n\n")


class Refusal(Exception):
    """Becomes an error object; as OpenAI's have it."""

    def __init__(self, status: int, kind: str, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.kind = kind


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Part(msgspec.Struct, frozen=True):
    text: str = ""


class Spoken(msgspec.Struct, frozen=True):
    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Asked(msgspec.Struct, frozen=True):
    """The fields of either request that matter here."""

    model: str | None = None
    prompt: str | list[int | str | list[int]] | None = None
    messages: list[Spoken] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Door(Protocol):
    """What an answer may have to wait for before the engine gets its request."""

    waiting: int  # requests that do

    def begin(self, prompt: Sequence[int], tokens: int, answer: Answer) -> None: ...


class OpenAi:
    """Handles the requests of a `HttpServer`; one model, one engine."""

    def __init__(
        self, engine: RealtimeEngine, model: str, gauges: Gauges, *, context_tokens: int
    ) -> None:
        self._engine = engine
        self._model = model
        self._gauges = gauges
        self._context_tokens = context_tokens
        self._created = int(time.time())
        self._numbers = itertools.count()
        self.waiting = 0
        self.door: Door = self

    def __call__(self, request: HttpRequest, reply: Reply) -> None:
        try:
            match request.method, request.path:
                case "POST", "/v1/completions":
                    self._answer(_asked(request.body), reply, is_chat=False)
                case "POST", "/v1/chat/completions":
                    self._answer(_asked(request.body), reply, is_chat=True)
                case "GET", "/health" | "/ping":
                    reply.whole(200, b"")
                case "GET", "/v1/models":
                    reply.whole(200, msgspec.json.encode(self._models()))
                case "GET", "/version":
                    reply.whole(200, b'{"version":"mock"}')
                case "GET", "/metrics":
                    text = self._gauges.text(self._engine.engine, self.door.waiting)
                    reply.whole(200, text.encode(), b"text/plain; version=0.0.4; charset=utf-8")
                case _, path:
                    raise Refusal(404, "NotFoundError", f"there is no {request.method} {path}")
        except Refusal as refusal:
            refuse(reply, refusal)

    def begin(self, prompt: Sequence[int], tokens: int, answer: Answer) -> None:
        """The door where nothing is waited for."""
        try:
            answer.start(self._engine, prompt, tokens)
        except RequestRefused as error:
            refuse(answer.reply, Refusal(400, "BadRequestError", str(error)))
        except EngineClosed:
            refuse(answer.reply, Refusal(503, "ServiceUnavailable", "the engine is closed"))

    def _answer(self, asked: Asked, reply: Reply, *, is_chat: bool) -> None:
        if asked.model is not None and asked.model != self._model:
            raise Refusal(404, "NotFoundError", f"the model `{asked.model}` does not exist")
        if asked.n not in {None, 1}:
            raise Refusal(400, "BadRequestError", "n: one answer a request is what there is")
        prompt = _prompt(asked, is_chat=is_chat)
        wanted = asked.max_completion_tokens or asked.max_tokens
        room = self._context_tokens - len(prompt)
        tokens = min(ANSWER_TOKENS, room) if wanted is None else wanted
        if tokens < 1 or tokens > room:
            why = f"{len(prompt)} tokens and an answer of {wanted}; the context is "
            raise Refusal(400, "BadRequestError", f"{why}{self._context_tokens}")
        options = asked.stream_options or StreamOptions()
        shape = _Shape(next(self._numbers), self._model, is_chat=is_chat)
        answer: Answer
        if asked.stream:
            answer = Streamed(reply, shape, len(prompt), with_usage=options.include_usage)
        else:
            answer = Whole(reply, shape, len(prompt))
        self.door.begin(prompt, tokens, answer)

    def _models(self) -> dict[str, Any]:
        about = {"id": self._model, "object": "model", "created": self._created}
        about |= {"owned_by": "mocker", "root": self._model}
        return {"object": "list", "data": [about | {"max_model_len": self._context_tokens}]}


class Answer:
    """A listener of the engine; the request ends with the connection, at whatever moment."""

    def __init__(self, reply: Reply, shape: _Shape, prompt_tokens: int) -> None:
        self.reply = reply
        self.is_gone = False
        self._shape = shape
        self._prompt_tokens = prompt_tokens
        self._leave: tuple[RealtimeEngine, int] | None = None
        reply.on_gone = self._gone

    def start(self, engine: RealtimeEngine, prompt: Sequence[int], tokens: int) -> None:
        """Raises RequestRefused, EngineClosed."""
        if not self.is_gone:
            self._leave = engine, engine.ask(prompt, tokens, self)

    def token(self, token: int, record: Record | None) -> None:
        raise NotImplementedError

    def closed(self) -> None:
        raise NotImplementedError

    def _gone(self) -> None:
        self.is_gone = True
        if self._leave is not None:
            engine, request_id = self._leave
            engine.leave(request_id)

    def _usage(self, record: Record) -> dict[str, Any]:
        cached = sum(record.cached_tokens.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + record.output_tokens,
            "completion_tokens": record.output_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Whole(Answer):
    def __init__(self, reply: Reply, shape: _Shape, prompt_tokens: int) -> None:
        super().__init__(reply, shape, prompt_tokens)
        self._tokens: list[int] = []

    def token(self, token: int, record: Record | None) -> None:
        self._tokens.append(token)
        if record is not None:
            body = self._shape.whole(text_of(self._tokens), self._usage(record))
            self.reply.whole(200, msgspec.json.encode(body))

    def closed(self) -> None:
        refuse(self.reply, Refusal(503, "ServiceUnavailable", "the engine was closed"))


class Streamed(Answer):
    """The bytes around a token's text are made once: all events but the last are as long."""

    def __init__(
        self, reply: Reply, shape: _Shape, prompt_tokens: int, *, with_usage: bool
    ) -> None:
        super().__init__(reply, shape, prompt_tokens)
        self._with_usage = with_usage
        self._begun = False
        before, after = shape.around()
        length = len(before) + len(TEXTS[0]) + len(after)
        self._before = b"%x\r\n%b" % (length, before)
        self._after = after + b"\r\n"

    def token(self, token: int, record: Record | None) -> None:
        if record is not None:
            self._end(token, record)
            return
        self._begin()
        self.reply.send(b"%b%b%b" % (self._before, TEXTS[token % VOCABULARY], self._after))

    def closed(self) -> None:
        if self._begun:
            self.reply.send(chunked(b'data: {"error":{"message":"the engine was closed"}}\n\n'))
            self.reply.end()
        else:
            refuse(self.reply, Refusal(503, "ServiceUnavailable", "the engine was closed"))

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.reply.begin()
            if self._shape.is_chat:
                self.reply.send(_event(self._shape.piece({"role": "assistant", "content": ""})))

    def _end(self, token: int, record: Record) -> None:
        self._begin()
        text = text_of([token])
        said: Any = {"content": text} if self._shape.is_chat else text
        last = _event(self._shape.piece(said, finish="length"))
        if self._with_usage:
            last += _event(self._shape.piece(None, usage=self._usage(record)))
        self.reply.send(last + DONE)
        self.reply.end()


class _Shape:
    """What answers look like in either API."""

    def __init__(self, number: int, model: str, *, is_chat: bool) -> None:
        self.is_chat = is_chat
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{number:x}"
        self._model = model
        self._created = int(time.time())

    def whole(self, text: str, usage: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": usage}

    def piece(
        self, said: Any, *, finish: str | None = None, usage: dict[str, Any] | None = None
    ) -> bytes:
        """One chunk; without a choice if nothing is said."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        choices: list[dict[str, Any]] = []
        if said is not None:
            field = "delta" if self.is_chat else "text"
            choices = [{"index": 0, field: said, "logprobs": None, "finish_reason": finish}]
        chunk = self._head(kind) | {"choices": choices}
        return msgspec.json.encode(chunk | ({"usage": usage} if usage else {}))

    def around(self) -> tuple[bytes, bytes]:
        """An event's bytes before and behind the text of its token."""
        mark = "\x01"
        said: Any = {"content": mark} if self.is_chat else mark
        before, after = self.piece(said).split(msgspec.json.encode(mark)[1:-1])
        return b"data: " + before, after + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }


def refuse(reply: Reply, refusal: Refusal) -> None:
    error = {"message": str(refusal), "type": refusal.kind, "param": None, "code": refusal.status}
    reply.whole(refusal.status, msgspec.json.encode({"error": error}), JSON)


def _event(data: bytes) -> bytes:
    return chunked(b"data: " + data + b"\n\n")


def _asked(body: bytes) -> Asked:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "BadRequestError", str(error)) from error


def _prompt(asked: Asked, *, is_chat: bool) -> list[int]:
    if is_chat:
        if not asked.messages:
            raise Refusal(400, "BadRequestError", "messages: at least one is needed")
        return tokens_of(conversation([(one.role, one.text) for one in asked.messages]))
    found: list[Any] | str = asked.prompt or []
    if len(found) == 1 and isinstance(found[0], str | list):
        found = found[0]
    if isinstance(found, str):
        return tokens_of(found)
    if not found or not all(isinstance(one, int) and 0 <= one < 1 << 32 for one in found):
        raise Refusal(400, "BadRequestError", "prompt: one text, or one list of token ids, please")
    return found


_decoder = msgspec.json.Decoder(Asked)
