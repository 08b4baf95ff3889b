"""OpenAI's routes that are passed through, and what of each request decides where it goes.

What cannot be made of a request here (a template that refuses its messages, parts that only the
engine understands) is no reason to refuse it: it is routed by load, and the engine has its say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from frontend.encoder import Tokens
from frontend.errors import ApiError, bad_request
from frontend.fleet import Fleet, Job
from frontend.gate import Scope
from frontend.prompt import NO_TOKENS, PromptMaker, of_ids
from frontend.relay import GENERATE, RESPONSES, Read, read_pinned, read_session
from frontend.request import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    MessagesRequest,
    ResponsesRequest,
    Sampled,
    chat_decoder,
    completion_decoder,
    decode,
    generate_decoder,
    messages_decoder,
    model_decoder,
    responses_decoder,
)

Reader = Callable[[bytes, Scope], Read]
R = TypeVar("R", bound=Sampled)

_BY_LOAD: Final = (
    *("/v1/embeddings", "/v2/embed", "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank"),
    *("/classify", "/pooling", "/tokenize", "/detokenize", "/v1/messages/count_tokens"),
    *("/v1/chat/completions/render", "/v1/completions/render"),
)
"""Nothing is generated, and little or nothing is reused."""


def readers(fleet: Fleet) -> dict[str, Reader]:
    """By path."""
    return {
        "/v1/chat/completions": _generating(fleet, chat_decoder, _chat_tokens),
        "/v1/completions": _generating(fleet, completion_decoder, _prompt_tokens),
        RESPONSES: _generating(fleet, responses_decoder, _response_tokens),
        "/v1/messages": _generating(fleet, messages_decoder, _message_tokens),
        GENERATE: _generating(fleet, generate_decoder, _given_tokens),
        **dict.fromkeys(_BY_LOAD, _by_load(fleet)),
    }


def _generating(
    fleet: Fleet,
    decoder: msgspec.json.Decoder[R],
    tokens_of: Callable[[PromptMaker | None, R], Tokens],
) -> Reader:
    def read(body: bytes, scope: Scope) -> Read:
        request = decode(decoder, body)
        text = _text(fleet, request.model)
        pinned = read_pinned(scope)

        def job(request_id: str) -> Job:
            return Job(
                request_id,
                request.model,
                tokens_of(text, request),
                request.output_tokens_max,
                priority=request.priority or 0,
                session=read_session(scope) or request.prompt_cache_key,
                cache_salt=request.cache_salt,
                pinned=pinned,
            )

        return Read(request.model, job, bool(request.stream))

    return read


def _by_load(fleet: Fleet) -> Reader:
    def read(body: bytes, scope: Scope) -> Read:
        model = decode(model_decoder, body).model
        _text(fleet, model)  # says if there is no such model
        pinned = read_pinned(scope)

        def job(request_id: str) -> Job:
            return Job(request_id, model, NO_TOKENS, session=read_session(scope), pinned=pinned)

        return Read(model, job)

    return read


def _text(fleet: Fleet, model: str) -> PromptMaker | None:
    if not model:
        raise bad_request("Say which model", "model", "missing")
    return fleet.text(model)


def _chat_tokens(text: PromptMaker | None, request: ChatRequest) -> Tokens:
    if text is None:
        return NO_TOKENS
    try:
        return text.of_chat(request)
    except ApiError:
        return NO_TOKENS  # the engine will say what is wrong, or understand it


def _prompt_tokens(text: PromptMaker | None, request: CompletionRequest) -> Tokens:
    """Of several prompts the longest: one engine gets them all."""
    if text is not None:
        return max(text.of_completion(request), key=len)
    prompt = request.prompt
    is_tokens = isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
    return of_ids(prompt) if is_tokens else NO_TOKENS


def _response_tokens(text: PromptMaker | None, request: ResponsesRequest) -> Tokens:
    return _chat_tokens(text, request.as_chat)


def _given_tokens(_: PromptMaker | None, request: GenerateRequest) -> Tokens:
    return of_ids(request.token_ids)


def _message_tokens(text: PromptMaker | None, request: MessagesRequest) -> Tokens:
    return _chat_tokens(text, request.as_chat)
