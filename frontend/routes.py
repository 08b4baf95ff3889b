"""OpenAI's routes that are passed through, and what of each request decides where it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from frontend.errors import bad_request
from frontend.fleet import Fleet, Job
from frontend.gate import Scope
from frontend.prompt import NO_TOKENS, PromptMaker, of_ids
from frontend.relay import Read, read_pinned, read_session
from frontend.request import (
    ChatRequest,
    CompletionRequest,
    Sampled,
    chat_decoder,
    completion_decoder,
    decode,
    pooled_decoder,
)
from frontend.tokenizer import Tokens

Reader = Callable[[bytes, Scope], Read]

POOLED: Final = ("/v1/embeddings", "/v1/score", "/v1/rerank", "/v1/classify", "/pooling")
"""Nothing is generated: routed by load alone."""
PLAIN: Final = ("/tokenize", "/detokenize", "/v1/responses", "/v1/messages")


def chat_reader(fleet: Fleet) -> Reader:
    def read(body: bytes, scope: Scope) -> Read:
        request = decode(chat_decoder, body)
        text = _text(fleet, request.model)

        def job(request_id: str) -> Job:
            tokens = NO_TOKENS if text is None else text.of_chat(request)
            return _job(request_id, request, tokens, scope, request.output_tokens_max)

        return Read(request.model, job)

    return read


def completion_reader(fleet: Fleet) -> Reader:
    def read(body: bytes, scope: Scope) -> Read:
        request = decode(completion_decoder, body)
        text = _text(fleet, request.model)

        def job(request_id: str) -> Job:
            tokens = _of_prompts(text, request)
            return _job(request_id, request, tokens, scope, request.output_tokens_max)

        return Read(request.model, job)

    return read


def pooled_reader(fleet: Fleet) -> Reader:
    def read(body: bytes, scope: Scope) -> Read:
        model = decode(pooled_decoder, body).model
        _text(fleet, model)  # says if there is no such model

        def job(request_id: str) -> Job:
            pinned = read_pinned(scope)
            return Job(request_id, model, NO_TOKENS, session=read_session(scope), pinned=pinned)

        return Read(model, job)

    return read


def _text(fleet: Fleet, model: str) -> PromptMaker | None:
    if not model:
        raise bad_request("Say which model", "model", "missing")
    return fleet.text(model)


def _of_prompts(text: PromptMaker | None, request: CompletionRequest) -> Tokens:
    """Of several prompts the longest: one engine gets them all."""
    if text is not None:
        return max(text.of_completion(request), key=len)
    prompt = request.prompt
    is_tokens = isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
    return of_ids(prompt) if is_tokens else NO_TOKENS


def _job(
    request_id: str,
    request: ChatRequest | CompletionRequest,
    tokens: Tokens,
    scope: Scope,
    output_tokens_max: int | None,
) -> Job:
    sampled: Sampled = request
    return Job(
        request_id,
        request.model,
        tokens,
        output_tokens_max,
        priority=sampled.priority or 0,
        session=read_session(scope) or sampled.prompt_cache_key,
        cache_salt=sampled.cache_salt,
        pinned=read_pinned(scope),
    )
