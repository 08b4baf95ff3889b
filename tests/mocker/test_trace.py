"""Reading traces: what is wrong is said with its line; blocks come out as the ids say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mocker.content import Chain, TokenContent, TraceContent
from mocker.timing import PS_PER_MS
from mocker.trace import TraceError, between, faster, parse_trace, read_trace, requests
from runtime.hashing import SEED


def line(**other: Any) -> str:
    entry = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2], **other}
    return json.dumps({name: value for name, value in entry.items() if value is not None})


def test_a_trace_is_read_and_empty_lines_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{line()}\n\n{line(timestamp=1.5, more='is ignored')}\n")
    entries = read_trace(path)
    assert [(e.timestamp_ms, e.input_tokens, e.output_tokens, e.hash_ids) for e in entries] == [
        (0, 600, 5, (1, 2)),
        (1.5, 600, 5, (1, 2)),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "a JSON object is needed, not list"),
        (line(timestamp=None, hash_ids=None), "without timestamp, hash_ids"),
        (line(timestamp=-1), "timestamp -1 is no time"),
        (line(timestamp="0"), "timestamp '0' is no time"),
        (line(timestamp=True), "timestamp True is no time"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "nan"),
        (line(input_length=0), "input_length 0 is no number of tokens"),
        (line(output_length=2.5), "output_length 2.5 is no number of tokens"),
        (line(hash_ids={}), "hash_ids must be a list, not dict"),
        (line(hash_ids=[1, -2]), "hash_ids: -2 is no whole number"),
        (line(hash_ids=[1, 1 << 58]), f"hash_ids: {1 << 58} is no whole number"),
        (line(hash_ids=[1]), "1 hash_ids, 600 tokens of input need 2"),
        (line(timestamp=4), "timestamp 4 is before 5"),
        (" " * (1 << 20) + line(), "longer than"),
    ],
)
def test_a_line_that_is_no_request_is_named_with_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_trace([line(timestamp=5), "\n", text], "file.jsonl")
    assert str(caught.value).startswith("file.jsonl, line 3: ")
    assert problem in caught.value.problem


def test_a_faster_trace_has_the_same_requests_sooner() -> None:
    entries = faster(parse_trace([line(), line(timestamp=9000)]), 3.0)
    assert [entry.timestamp_ms for entry in entries] == [0, 3000]
    with pytest.raises(ValueError, match="rate"):
        faster(entries, 0)


def test_a_slice_begins_at_0() -> None:
    entries = parse_trace([line(timestamp=ms) for ms in (0, 10, 15, 20)])
    assert [entry.timestamp_ms for entry in between(entries, 10, 20)] == [0, 5]


@pytest.mark.parametrize("block_size", [8, 48, 1024])
def test_block_sizes_that_do_not_divide_the_traces_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block size of {block_size}"):
        next(requests(parse_trace([line()]), block_size))


def test_requests_arrive_in_picoseconds_and_know_their_whole_blocks() -> None:
    (at_ps, request), (_, other) = requests(
        parse_trace([line(timestamp=7), line(timestamp=8, hash_ids=[1, 3])]), 16
    )
    assert at_ps == 7 * PS_PER_MS
    assert (request.prompt_tokens, request.output_tokens) == (600, 5)
    for each in (request, other):
        each.chain.extend(600 // 16)
    assert request.chain.hashes[:32] == other.chain.hashes[:32]
    assert not set(request.chain.hashes[32:]) & set(other.chain.hashes[32:])


@given(
    ids=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    split=st.sampled_from([1, 2, 8]),
    short=st.integers(0, 7),
    own=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_hashes_do_not_depend_on_the_steps_they_are_asked_in(
    ids: list[int], split: int, short: int, own: int, cuts: list[int]
) -> None:
    whole = max(len(ids) * split - short % split, 0)
    end = whole + own
    at_once, by_steps = (Chain(TraceContent(ids, split, whole, 7)) for _ in range(2))
    at_once.extend(end)
    for cut in cuts:
        by_steps.extend(min(cut, end))
    by_steps.extend(end)
    assert at_once.locals == by_steps.locals
    assert at_once.hashes == by_steps.hashes
    assert len(at_once.hashes) == end
    named = [identity * split + part for identity in ids for part in range(split)][:whole]
    assert len(set(at_once.locals)) == len(set(named)) + own  # equal ids, equal hashes
    assert len(set(at_once.hashes)) == end  # but never the same block twice


def test_generated_blocks_are_nobody_elses() -> None:
    one, two = (Chain(TraceContent([5], 1, 1, number)) for number in (1, 2))
    one.extend(3)
    two.extend(3)
    assert one.hashes[0] == two.hashes[0]
    assert not set(one.locals[1:]) & set(two.locals[1:])


def test_blocks_of_tokens_hash_as_on_the_wire() -> None:
    """The vectors of the wire format: tokens 0..15 and 16..31 in blocks of 16."""
    chain = Chain(TokenContent(range(32), 16))
    chain.extend(2)
    assert chain.locals == [15310707395893867146, 15292316782987903195]
    pair = b"".join(value.to_bytes(8, "little") for value in chain.locals)
    assert chain.hashes == [chain.locals[0], xxhash.xxh3_64_intdigest(pair, SEED)]
