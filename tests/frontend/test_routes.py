"""What of a request decides where it goes: its tokens, as the engine will see them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from frontend.errors import ApiError
from frontend.gate import Scope
from frontend.prompt import PromptMaker
from frontend.routes import readers
from frontend.template import ChatTemplate
from frontend.tokenizer import Tokenizer
from tests.frontend.engines import MODEL, InTurn
from tests.frontend.test_tokenizer import byte_level_once

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
)
SCOPE: Scope = {"headers": [(b"x-session-id", b"s1")]}
SYSTEM_AND_HELLO = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
HELLO = "<|im_start|>user\nhello<|im_end|>\n"


@pytest.fixture(scope="module")
def text() -> PromptMaker:
    return PromptMaker(Tokenizer(byte_level_once()), ChatTemplate(TEMPLATE, {}))


@pytest.mark.parametrize(
    ("path", "body", "expected", "limit"),
    [
        ("/v1/completions", {"prompt": "the fox", "max_tokens": 7}, "the fox", 7),
        ("/v1/completions", {"prompt": ["a", "the quick fox"]}, "the quick fox", 16),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 9},
            HELLO,
            9,
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
            HELLO,
            None,
        ),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "", None),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 5}, HELLO, 5),
        (
            "/v1/responses",
            {
                "instructions": "Be brief.",
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
                    {"type": "reasoning", "summary": []},
                ],
            },
            SYSTEM_AND_HELLO,
            None,
        ),
        (
            "/v1/messages",
            {
                "system": [{"type": "text", "text": "Be brief."}],
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 3,
            },
            SYSTEM_AND_HELLO,
            3,
        ),
        ("/v1/embeddings", {"input": "hello"}, "", None),
        ("/tokenize", {"prompt": "hello"}, "", None),
    ],
)
def test_tokens_and_limits(
    text: PromptMaker, path: str, body: dict[str, Any], expected: str, limit: int | None
) -> None:
    read = readers(InTurn([], text))[path](json.dumps({"model": MODEL, **body}).encode(), SCOPE)
    job = read.job("r1")
    assert job.tokens.tolist() == text.tokenizer.fast.encode(expected).ids
    assert (job.id, job.model, job.output_tokens_max, job.session) == ("r1", MODEL, limit, "s1")


def test_tokens_are_taken_as_they_are_without_a_tokenizer() -> None:
    path = "/v1/completions"
    body = json.dumps({"model": MODEL, "prompt": [5, 6, 7]}).encode()
    assert readers(InTurn([]))[path](body, SCOPE).job("r1").tokens.tolist() == [5, 6, 7]
    body = json.dumps({"model": MODEL, "prompt": "text"}).encode()
    assert readers(InTurn([]))[path](body, SCOPE).job("r1").tokens.tolist() == []


def test_tokens_that_are_given_need_no_tokenizer() -> None:
    asked = {"model": MODEL, "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 9}}
    read = readers(InTurn([]))["/inference/v1/generate"]
    job = read(json.dumps({**asked, "cache_salt": "t1"}).encode(), SCOPE).job("r1")
    assert (job.tokens.tolist(), job.output_tokens_max, job.cache_salt) == ([5, 6, 7], 9, "t1")
    wrong = read(json.dumps({**asked, "token_ids": [-1]}).encode(), SCOPE)
    with pytest.raises(ApiError, match="numbers from 0"):
        wrong.job("r1")


def test_what_sets_a_request_apart() -> None:
    body = {"model": MODEL, "prompt": [1], "cache_salt": "t1", "priority": 3}
    scope: Scope = {"headers": []}
    read = readers(InTurn([]))["/v1/completions"]
    job = read(json.dumps({**body, "prompt_cache_key": "k"}).encode(), scope).job("r1")
    assert (job.cache_salt, job.priority, job.session) == ("t1", 3, "k")
