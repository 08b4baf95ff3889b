"""Tokens of answers whose bytes go through unread: as engines tell them, else by their events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from frontend.tally import LINE_BYTES_MAX, PerEvent, Tally, told_by

DONE = b"data: [DONE]\n\n"
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chat(text: str, **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], **more})


def usage(tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": 9, "total_tokens": 9 + tokens, "completion_tokens": tokens}


def counted(*parts: bytes, per_event: PerEvent | None = None) -> tuple[int, int, bool]:
    """While it came, the first token that its coming tells of included; in the end; and if told."""
    tally = Tally(per_event or PerEvent())
    live = 1 + sum(map(tally.take, parts))
    return live, live + tally.end(), tally.is_told


def test_a_stream_that_tells_nothing_has_a_token_an_event() -> None:
    parts = [event(ROLE), *(chat(f"w{n}") for n in range(5)), b": a comment\n\n", DONE]
    assert counted(*parts) == (5, 5, False)
    assert counted(b"".join(parts)) == (5, 5, False)
    plain = [event({"choices": [{"index": 0, "text": "w"}]}) for _ in range(5)]
    assert counted(*plain, DONE) == (5, 5, False)


def test_usage_at_the_end_tells_what_events_of_several_tokens_brought() -> None:
    parts = [event(ROLE), chat("three"), chat("more")]
    last = event({"choices": [], "usage": usage(6)})
    assert counted(*parts, last, DONE) == (6, 6, True)
    assert counted(*parts, event({"choices": [], "usage": usage(1)}), DONE) == (2, 1, True)


def test_usage_with_every_event_counts_at_once() -> None:
    tally = Tally(PerEvent())
    events = [chat("w", usage=usage(tokens)) for tokens in (3, 5, 9)]
    assert [tally.take(part) for part in (event(ROLE), *events, DONE)] == [0, 2, 2, 4, 0]
    assert (tally.end(), tally.is_told) == (0, True)


def test_tokens_that_come_with_their_text_are_counted() -> None:
    def some(*ids: int) -> bytes:
        return event({"choices": [{"index": 0, "text": "w", "token_ids": list(ids)}]})

    first = event({"choices": [{"index": 0, "text": "w", "prompt_token_ids": [1] * 99}]})
    assert counted(first, some(7, 8, 9), some(7), some(), DONE) == (4, 4, True)


def test_other_apis_tell_in_their_own_words() -> None:
    delta = {"type": "response.output_text.delta", "delta": "w"}
    ending = {"type": "response.completed", "response": {"usage": {"output_tokens": 12}}}
    assert counted(event(delta), event(delta), event(ending))[1:] == (12, True)
    text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}}
    ending = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 7}}
    assert counted(event(text), event(ending))[1:] == (7, True)


@pytest.mark.parametrize("cut", [5, 30, 60, -20, -1])
def test_an_event_may_come_in_pieces(cut: int) -> None:
    whole = chat("w") + event({"choices": [], "usage": usage(41)}) + DONE
    last = whole.rindex(b"data: {")
    at = last + cut if cut > 0 else len(whole) - len(DONE) + cut
    assert counted(whole[:at], whole[at:])[1:] == (41, True)


def test_what_only_looks_like_usage_is_text() -> None:
    assert counted(chat('"usage":{"completion_tokens":99}'), DONE) == (1, 1, False)
    tools = {"response": {"tools": [{"usage": {"output_tokens": 1 << 40}}]}}
    assert counted(event(tools), DONE)[2] is False
    for wrong in (-1, 1 << 40, "many", None):
        made = event({"choices": [], "usage": {"completion_tokens": wrong}})
        assert counted(chat("w"), made)[2] is False
    assert counted(b"data: {token\xff\n\n") == (1, 1, False)


def test_a_line_without_an_end_is_not_kept() -> None:
    tally = Tally(PerEvent())
    for _ in range(4):
        tally.take(b"token" * (LINE_BYTES_MAX // 10))
        assert len(tally._rest) <= LINE_BYTES_MAX


def test_answers_that_tell_teach_what_an_event_of_the_others_brings() -> None:
    per_event = PerEvent()
    told = [*(chat("www") for _ in range(50)), event({"choices": [], "usage": usage(150)}), DONE]
    for _ in range(200):
        counted(*told, per_event=per_event)
    assert per_event.tokens == pytest.approx(3, rel=0.05)
    silent = [chat("www") for _ in range(50)]
    live, end, is_told = counted(*silent, DONE, per_event=per_event)
    assert (live, is_told) == (end, False)
    assert end == pytest.approx(150, rel=0.05)


def test_a_whole_answer_tells_by_its_usage() -> None:
    assert told_by(json.dumps({"choices": [], "usage": usage(17)}).encode()) == 17
    assert told_by(json.dumps({"output": [], "usage": {"output_tokens": 3}}).encode()) == 3
    assert told_by(b'{"object": "text_completion"}') == 0
    assert told_by(b'{"usage": {"completion_tokens": 1') == 0
