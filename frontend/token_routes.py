"""Chat and completions for models whose engines take tokens: the answer is made here.

Template and tokenizer are the model's, read by the frontend; text, stop strings, choices and usage
are its work. What only an engine's own server can make (logprobs, tool calls, grammars) is refused
by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final

from frontend import headers as names
from frontend.answers import DONE, ChatForm, Choice, CompletionForm, Form, Usage
from frontend.encoder import Tokens
from frontend.errors import UNSUPPORTED, bad_request
from frontend.fleet import Assigned, Fleet, Job
from frontend.gate import Scope
from frontend.generate import Generation
from frontend.hints import read_hints
from frontend.keep_alive import EVENT_STREAM, NEVER, Head, KeepAlive
from frontend.meter import Measured
from frontend.prompt import PromptMaker, has_only_text
from frontend.relay import read_pinned, read_session, say_where
from frontend.request import (
    ChatRequest,
    CompletionRequest,
    chat_decoder,
    completion_decoder,
    decode,
)
from frontend.respond import Reply
from frontend.sampling import CHOICES_MAX, SamplingFields, sampling_decoder
from frontend.text_out import CONTEXT_TOKENS, TextOut
from runtime.generation import Generated

OUTPUT_TOKENS: Final = 16  # of a completion that does not say, as OpenAI has it
_JSON: Final = ((b"content-type", b"application/json"),)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, ready to be generated: one choice for each of `prompts`."""

    prompts: Sequence[Tokens]
    fields: SamplingFields
    form: Form
    n: int
    max_tokens: int
    stream: bool
    include_usage: bool
    echo: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of one choice: text, and in the last one why it is the last."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    cached_tokens: int | None = None


class TokenRoutes:
    """`chat` and `completions` are handlers; see `frontend.exchange`."""

    def __init__(self, fleet: Fleet, generation: Generation, keep_alive: KeepAlive = NEVER) -> None:
        self._fleet = fleet
        self._generation = generation
        self._keep_alive = keep_alive

    async def chat(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        request, fields = decode(chat_decoder, body), decode(sampling_decoder, body)
        text = self._text(request.model)
        fields.check(has_tools=bool(request.tools))
        if not has_only_text(request.messages):
            said = "Messages that are more than text need a model that is passed through"
            raise bad_request(said, "messages", UNSUPPORTED)
        prompt = text.of_chat(request)
        form = ChatForm(reply.request_id, request.model)
        asked = self._asked(request, fields, [prompt], form, request.output_tokens_max)
        await self._answer(asked, request, text, scope, reply, measured)

    async def completions(
        self, body: bytes, scope: Scope, reply: Reply, measured: Measured
    ) -> None:
        request, fields = decode(completion_decoder, body), decode(sampling_decoder, body)
        text = self._text(request.model)
        fields.check(has_tools=False)
        if request.prompt is None:
            raise bad_request("There must be a prompt", "prompt", "missing")
        form = CompletionForm(reply.request_id, request.model)
        limit = OUTPUT_TOKENS if request.max_tokens is None else request.max_tokens
        asked = self._asked(request, fields, text.of_completion(request), form, limit)
        await self._answer(asked, request, text, scope, reply, measured)

    def _text(self, model: str) -> PromptMaker:
        if not model:
            raise bad_request("Say which model", "model", "missing")
        text = self._fleet.text(model)
        if text is None:
            said = f"No tokenizer is known here for {model!r}: the frontend's settings name none"
            raise bad_request(said, "model", "no_tokenizer")
        return text

    def _asked(
        self,
        request: ChatRequest | CompletionRequest,
        fields: SamplingFields,
        prompts: Sequence[Tokens],
        form: Form,
        limit: int | None,
    ) -> Asked:
        n = 1 if request.n is None else request.n
        if not 0 < n * len(prompts) <= CHOICES_MAX:
            raise bad_request(f"n is {n}; choices must be 1 to {CHOICES_MAX}", "n", "range")
        options = request.stream_options
        return Asked(
            [prompt for prompt in prompts for _ in range(n)],
            fields,
            form,
            n,
            self._room(request.model, max(map(len, prompts)), limit),
            bool(request.stream),
            bool(options and options.include_usage),
            fields.echo and isinstance(request, CompletionRequest),
        )

    def _room(self, model: str, prompt_tokens: int, limit: int | None) -> int:
        """The most tokens that may come. Raises ApiError."""
        if prompt_tokens == 0:
            raise bad_request("The prompt is empty", "prompt", "empty")
        if limit is not None and limit < 1:
            raise bad_request(f"max_tokens is {limit}; it must be above 0", "max_tokens", "range")
        contexts = [one.context_tokens for one in self._fleet.models() if one.name == model]
        context = contexts[0] if contexts else None
        if context is None:
            return OUTPUT_TOKENS if limit is None else limit
        if prompt_tokens + (limit or 1) > context:
            raise bad_request(
                f"The model's context is {context} tokens; the prompt has {prompt_tokens} and "
                f"{limit or 1} are to come",
                "max_tokens" if limit else "prompt",
                "context_length_exceeded",
            )
        return context - prompt_tokens if limit is None else limit

    async def _answer(
        self,
        asked: Asked,
        request: ChatRequest | CompletionRequest,
        text: PromptMaker,
        scope: Scope,
        reply: Reply,
        measured: Measured,
    ) -> None:
        measured.model = request.model
        measured.prepared(sum(map(len, asked.prompts)))
        session = read_session(scope) or request.prompt_cache_key
        pinned = read_pinned(scope)
        hints = read_hints(scope, request)
        headers = {
            "x-request-id": reply.request_id,
            "traceparent": names.traceparent(scope["headers"]).decode(),
        }

        def placed(assigned: Assigned) -> None:
            if reply.status is None:
                say_where(assigned, reply)

        def choice(index: int) -> AsyncGenerator[Sequence[Piece]]:
            job = Job(
                reply.request_id if len(asked.prompts) == 1 else f"{reply.request_id}-{index}",
                request.model,
                asked.prompts[index],
                asked.max_tokens,
                priority=request.priority or 0,
                session=session,
                cache_salt=request.cache_salt,
                pinned=pinned,
                hints=hints,
            )
            sampling = asked.fields.sampling(asked.max_tokens, index % asked.n)
            made = self._generation.run(job, sampling, headers, measured, placed)
            return _pieces(index, asked, text, made)

        pieces = (
            choice(0)
            if len(asked.prompts) == 1
            else _merged([choice(index) for index in range(len(asked.prompts))])
        )
        usage = Usage(sum(map(len, {id(prompt): prompt for prompt in asked.prompts}.values())))
        async with aclosing(pieces):
            if not asked.stream:
                await _whole(asked, pieces, usage, reply, measured)
                return
            with self._keep_alive.watching(reply, partial(_opening, measured)):
                await _stream(asked, pieces, usage, reply, measured)


async def _stream(
    asked: Asked,
    pieces: AsyncGenerator[Sequence[Piece]],
    usage: Usage,
    reply: Reply,
    measured: Measured,
) -> None:
    form = asked.form
    async for some in pieces:
        events: list[bytes] = []
        if reply.latest is None:
            measured.first_token()
            if reply.status is None:
                await reply.begin(200, EVENT_STREAM)
            events += map(form.opening, range(len(asked.prompts)))
        for piece in some:
            _count(usage, piece)
            measured.output(piece.tokens)
            if piece.text:
                events.append(form.piece(piece.index, piece.text))
            if piece.finish_reason is not None:
                events.append(form.ending(piece.index, piece.finish_reason))
        if event := b"".join(events):
            await reply.part(event)
    await reply.part((form.usage(usage) if asked.include_usage else b"") + DONE)
    await reply.end()


async def _whole(
    asked: Asked,
    pieces: AsyncGenerator[Sequence[Piece]],
    usage: Usage,
    reply: Reply,
    measured: Measured,
) -> None:
    choices = [Choice() for _ in asked.prompts]
    async for some in pieces:
        measured.first_token()
        for piece in some:
            measured.output(piece.tokens)
            _count(usage, piece)
            choice = choices[piece.index]
            choice.text.append(piece.text)
            choice.finish_reason = piece.finish_reason
    await reply.whole(200, _JSON, asked.form.whole(choices, usage))


def _opening(measured: Measured) -> Head | None:
    """While it waits for an engine it may still be refused with a status of its own."""
    return EVENT_STREAM if measured.placed else None


def _count(usage: Usage, piece: Piece) -> None:
    usage.completion_tokens += piece.tokens
    if piece.cached_tokens is not None:
        usage.cached_tokens = max(usage.cached_tokens or 0, piece.cached_tokens)


async def _pieces(
    index: int, asked: Asked, text: PromptMaker, generated: AsyncGenerator[Sequence[Generated]]
) -> AsyncGenerator[Sequence[Piece]]:
    """Of one choice, as they come together; nothing comes after the one that is the last."""
    fields = asked.fields
    include_stop = fields.include_stop_str_in_output
    out = TextOut(
        text.tokenizer.fast,
        fields.stops,
        prompt=asked.prompts[index][-CONTEXT_TOKENS:].tolist(),
        min_tokens=fields.min_tokens or 0,
        skip_special_tokens=fields.skip_special_tokens,
        include_stop=include_stop,
    )
    if asked.echo:
        yield [Piece(index, text.tokenizer.decode(asked.prompts[index].tolist()), 0)]
    async with aclosing(generated) as batches:
        async for items in batches:
            pieces: list[Piece] = []
            for item in items:
                pieces.append(_piece(index, out, item, include_stop=include_stop))
                if pieces[-1].finish_reason is not None:
                    yield pieces
                    return  # which ends the engine's work, if it has not come to its end
            yield pieces


def _piece(index: int, out: TextOut, item: Generated, *, include_stop: bool) -> Piece:
    """`include_stop`: the token that ended it is part of the text."""
    before, finish = out.tokens, item.finish_reason
    said = out.feed(item.token_ids)
    if item.stop_token is not None and include_stop:
        said += out.feed([item.stop_token])
    count = out.tokens - before
    if out.stopped is not None:
        finish = "stop"
    elif finish is not None:
        said += out.end()
        if item.stop_token is not None and not include_stop:
            count += 1  # it was generated, though nobody sees it
    return Piece(index, said, count, finish, item.cached_tokens)


async def _merged(
    choices: Sequence[AsyncGenerator[Sequence[Piece]]],
) -> AsyncGenerator[Sequence[Piece]]:
    """Pieces of all, as they come; one that fails fails all."""
    coming = {asyncio.ensure_future(anext(one)): one for one in choices}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                choice = coming.pop(task)
                try:
                    piece = task.result()
                except StopAsyncIteration:
                    continue
                coming[asyncio.ensure_future(anext(choice))] = choice
                yield piece
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for choice in choices:
            await choice.aclose()
