"""Answers made from tokens: text, stops, choices, usage; and engines that are lost on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.frontend.engines import MODEL, Worker
from tests.frontend.test_tokenizer import byte_level_once
from tests.frontend.token_engines import Asking, TokenEngine, token_frontend

ANSWER = " jumps over the lazy dog, doesn't it? 12345 图书馆"
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 200}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
PROMPT_TOKENS = len(byte_level_once().encode("the quick brown fox").ids)
ANSWER_TOKENS = len(byte_level_once().encode(ANSWER).ids)


async def ask(
    asking: Asking, body: dict[str, Any], path: str = "/v1/completions", status: int = 200
) -> Any:
    response = await asking.http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


async def stream(
    asking: Asking, body: dict[str, Any], path: str = "/v1/completions"
) -> list[dict[str, Any]]:
    response = await asking.http.post(path, json={**body, "stream": True})
    events = [part.removeprefix("data: ") for part in response.text.strip().split("\n\n")]
    if events[-1] == "[DONE]":
        del events[-1]
    else:
        assert "error" in events[-1], events[-1]
    return [json.loads(event) for event in events]


async def test_a_completion() -> None:
    async with token_frontend(TokenEngine(1, ANSWER)) as asking:
        found = await ask(asking, COMPLETION)
        assert found["object"] == "text_completion"
        assert found["choices"] == [
            {"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}
        ]
        assert found["usage"] == {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": ANSWER_TOKENS,
            "total_tokens": PROMPT_TOKENS + ANSWER_TOKENS,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        assert asking.given[0].notes[-1] == "end"


async def test_a_chat() -> None:
    engine = TokenEngine(1, ANSWER)
    async with token_frontend(engine) as asking:
        found = await ask(asking, CHAT, "/v1/chat/completions")
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": ANSWER}
        text = byte_level_once().decode(engine.asked[0].token_ids, skip_special_tokens=False)
        assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant"
        assert engine.asked[0].sampling.max_tokens == 4096 - len(engine.asked[0].token_ids)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_says_the_same_as_the_whole(path: str) -> None:
    async with token_frontend(TokenEngine(1, ANSWER)) as asking:
        body = COMPLETION if path == "/v1/completions" else CHAT
        options = {"stream_options": {"include_usage": True}}
        events = await stream(asking, {**body, **options}, path)
        whole = await ask(asking, body, path)
        *pieces, last, usage = events
        if path == "/v1/completions":
            text = "".join(event["choices"][0]["text"] for event in pieces)
        else:
            assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(event["choices"][0]["delta"]["content"] for event in pieces)
        assert text == ANSWER
        assert last["choices"][0]["finish_reason"] == "stop"
        assert usage["choices"] == []
        assert usage["usage"] == whole["usage"]
        assert len({event["id"] for event in events}) == 1
        assert all(event["choices"][0]["finish_reason"] is None for event in pieces)


async def test_the_limit_ends_it() -> None:
    async with token_frontend(TokenEngine(1, ANSWER)) as asking:
        found = await ask(asking, {**COMPLETION, "max_tokens": 3})
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 3


async def test_a_stop_string_ends_it_and_the_engines_work() -> None:
    engine = TokenEngine(1, ANSWER)
    async with token_frontend(engine) as asking:
        body = {**COMPLETION, "stop": ["the l", "12345"]}
        found = await ask(asking, body)
        assert found["choices"][0]["text"] == " jumps over "
        assert found["choices"][0]["finish_reason"] == "stop"
        await engine.cancelled.wait()
        events = await stream(asking, {**body, "include_stop_str_in_output": True})
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == " jumps over the l"


async def test_several_choices_of_several_prompts() -> None:
    async with token_frontend(TokenEngine(1, ANSWER)) as asking:
        body = {**COMPLETION, "prompt": ["the quick brown fox", "the fox"], "n": 2, "echo": True}
        found = await ask(asking, body)
        texts = [choice["text"] for choice in found["choices"]]
        assert texts == ["the quick brown fox" + ANSWER] * 2 + ["the fox" + ANSWER] * 2
        assert found["usage"]["completion_tokens"] == 4 * ANSWER_TOKENS
        prompts = PROMPT_TOKENS + len(byte_level_once().encode("the fox").ids)
        assert found["usage"]["prompt_tokens"] == prompts
        by_choice = ["", "", "", ""]
        for event in await stream(asking, body):
            by_choice[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert by_choice == texts
        assert len({job.id for job in asking.fleet.jobs[:4]}) == 4


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("crash_after", [0, 5])
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_goes_on_at_another_engine(
    gone: bool, crash_after: int, streamed: bool
) -> None:
    first = TokenEngine(1, ANSWER, crash_after=crash_after, gone=gone)
    second = TokenEngine(2, ANSWER, cached=9)
    async with token_frontend(first, second) as asking:
        if streamed:
            events = await stream(asking, COMPLETION)
            text = "".join(event["choices"][0]["text"] for event in events)
        else:
            found = await ask(asking, COMPLETION)
            text = found["choices"][0]["text"]
            assert found["usage"]["completion_tokens"] == ANSWER_TOKENS
            assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == (
                4 if crash_after else 9
            )
        assert text == ANSWER
        answer = byte_level_once().encode(ANSWER).ids
        assert second.asked[0].token_ids == first.asked[0].token_ids + answer[:crash_after]
        assert second.asked[0].sampling.max_tokens == 200 - crash_after
        assert asking.given[0].notes[-2:] == ["failed", "end"]
        assert asking.fleet.jobs[1].excluded == (1,)


async def test_an_answer_goes_on_no_more_often_than_is_set() -> None:
    engines = [TokenEngine(number, ANSWER, crash_after=2) for number in range(1, 4)]
    async with token_frontend(*engines, migrations_max=1) as asking:
        assert (await ask(asking, COMPLETION, status=502))["error"]["code"] == "engine_lost"
        assert [len(engine.asked) for engine in engines] == [1, 1, 0]
        engines[0].crash_after = engines[1].crash_after = 2
        events = await stream(asking, COMPLETION)
        assert events[-1]["error"]["code"] == "engine_lost"


async def test_a_long_sequence_is_not_computed_again() -> None:
    engines = [TokenEngine(1, ANSWER, crash_after=4), TokenEngine(2, ANSWER)]
    async with token_frontend(*engines, migration_tokens_max=PROMPT_TOKENS + 3) as asking:
        found = await ask(asking, COMPLETION, status=502)
        assert "too long" in found["error"]["message"]
        assert not engines[1].asked


@pytest.mark.parametrize("crash_after", [None, 0])
async def test_a_prompt_is_computed_elsewhere_first(crash_after: int | None) -> None:
    decode, prefill = TokenEngine(1, ANSWER), TokenEngine(2, ANSWER, crash_after=crash_after)
    async with token_frontend(decode, prefill) as asking:
        asking.fleet.prefill = Worker(2, prefill.url)
        assert (await ask(asking, COMPLETION))["choices"][0]["text"] == ANSWER
        (first,) = prefill.asked
        assert first.token_ids == decode.asked[0].token_ids
        assert first.sampling.max_tokens == 1
        assert asking.given[0].notes[0] == "prefilled"


async def test_an_engine_lost_after_its_last_token_lost_nothing() -> None:
    engines = [TokenEngine(1, ANSWER), TokenEngine(2, ANSWER)]
    engines[0].crash_after = 3
    async with token_frontend(*engines) as asking:
        engines[0].answer = ANSWER
        found = await ask(asking, {**COMPLETION, "max_tokens": 4})
        assert found["usage"]["completion_tokens"] == 4


async def test_each_choice_has_a_seed_of_its_own_as_at_one_engine() -> None:
    engine = TokenEngine(1, ANSWER)
    async with token_frontend(engine) as asking:
        await ask(asking, {**COMPLETION, "prompt": ["one", "another"], "n": 2, "seed": 7})
        assert sorted(asked.sampling.seed or 0 for asked in engine.asked) == [7, 7, 8, 8]


async def test_what_governs_sampling_reaches_the_engine() -> None:
    engine = TokenEngine(1, ANSWER)
    async with token_frontend(engine) as asking:
        given = {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "seed": 7,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "logit_bias": {"5": -100},
            "stop": "never",
            "stop_token_ids": [3],
            "min_tokens": 2,
            "ignore_eos": True,
            "cache_salt": "t1",
            "priority": 2,
        }
        await ask(asking, {**COMPLETION, **given})
        (asked,) = engine.asked
        sampling = asked.sampling
        for name in ("temperature", "top_p", "top_k", "seed", "presence_penalty"):
            assert getattr(sampling, name) == given[name]
        assert sampling.logit_bias == {5: -100.0}
        assert (sampling.stop, sampling.stop_token_ids) == (["never"], [3])
        assert sampling.min_tokens == 2
        assert (asked.cache_salt, asked.priority, sampling.ignore_eos) == ("t1", 2, True)


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"logprobs": 3}, "unsupported", "logprobs"),
        ({"temperature": 3}, "range", "temperature"),
        ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
        ({"n": 0}, "range", "n"),
        ({"n": 1000}, "range", "n"),
        ({"max_tokens": 0}, "range", "max_tokens"),
        ({"max_tokens": 5000}, "context_length_exceeded", "max_tokens"),
        ({"prompt": []}, "empty", "prompt"),
        ({"prompt": ""}, "empty", "prompt"),
        ({"suffix": "x"}, "unsupported", "suffix"),
        ({"structured_outputs": {"choice": ["a"]}}, "unsupported", "structured_outputs"),
        ({"bad_words": ["a"]}, "unsupported", "bad_words"),
        ({"best_of": 3}, "unsupported", "best_of"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)
async def test_what_cannot_be_made_is_refused_by_name(
    more: dict[str, Any], code: str, param: str
) -> None:
    async with token_frontend(TokenEngine(1, ANSWER)) as asking:
        status = 404 if code == "model_not_found" else 400
        error = (await ask(asking, {**COMPLETION, **more}, status=status))["error"]
        assert (error["code"], error["param"]) == (code, param)
        assert not asking.given


async def test_a_chat_that_its_template_refuses_or_with_tools() -> None:
    async with token_frontend(TokenEngine(1, ANSWER)) as asking:
        path = "/v1/chat/completions"
        tools = [{"type": "function", "function": {"name": "f"}}]
        error = (await ask(asking, {**CHAT, "tools": tools}, path, status=400))["error"]
        assert (error["code"], error["param"]) == ("unsupported", "tools")
        none = {**CHAT, "tools": tools, "tool_choice": "none"}
        assert (await ask(asking, none, path))["choices"][0]["message"]["content"] == ANSWER
        error = (await ask(asking, {**CHAT, "messages": []}, path, status=400))["error"]
        assert error["param"] == "messages"
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, picture]}]
        error = (await ask(asking, {**CHAT, "messages": messages}, path, status=400))["error"]
        assert (error["code"], error["param"]) == ("unsupported", "messages")
