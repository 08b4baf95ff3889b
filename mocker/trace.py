"""Traces in Mooncake's format: one JSON object a line, read with clear errors, expanded lazily.

`timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one for each 512 tokens
begun. Equal ids at equal positions with equal ids before them are the same tokens. Tokens are never
made: blocks of the engine's size, which divides 512, get their hashes from the ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mocker.content import TraceContent
from mocker.sequence import Request
from mocker.timing import PS_PER_MS

TRACE_BLOCK_TOKENS: Final = 512
BLOCK_SIZE_MIN: Final = 16
ID_MAX: Final = (1 << 58) - 1
LINES_MAX: Final = 10_000_000
LINE_CHARACTERS_MAX: Final = 1 << 20


class TraceError(ValueError):
    """A line that is no request of a trace."""

    def __init__(self, source: str, line: int, problem: str) -> None:
        super().__init__(f"{source}, line {line}: {problem}")
        self.source = source
        self.line = line
        self.problem = problem


@dataclass(frozen=True, slots=True)
class TraceEntry:
    timestamp_ms: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path) -> list[TraceEntry]:
    """Raises TraceError, or OSError where the file cannot be read."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return parse_trace(file, str(path))


def parse_trace(lines: Iterable[str], source: str = "trace") -> list[TraceEntry]:
    """Empty lines are passed over; times must not go back."""
    entries: list[TraceEntry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(entries) == LINES_MAX:
            raise TraceError(source, number, f"more than {LINES_MAX} requests")
        entry = _entry(source, number, line)
        if entries and entry.timestamp_ms < entries[-1].timestamp_ms:
            problem = f"timestamp {entry.timestamp_ms} is before {entries[-1].timestamp_ms}"
            raise TraceError(source, number, f"{problem}, that of the request before it")
        entries.append(entry)
    return entries


def faster(entries: Sequence[TraceEntry], factor: float) -> list[TraceEntry]:
    """The same requests at `factor` times the rate of arrival."""
    if not 0 < factor < float("inf"):
        raise ValueError(f"the rate cannot be {factor} times what it was")
    return [replace(entry, timestamp_ms=entry.timestamp_ms / factor) for entry in entries]


def between(entries: Sequence[TraceEntry], begin_ms: float, end_ms: float) -> list[TraceEntry]:
    """Requests that arrive from `begin_ms` on and before `end_ms`; the times begin at 0 anew."""
    return [
        replace(entry, timestamp_ms=entry.timestamp_ms - begin_ms)
        for entry in entries
        if begin_ms <= entry.timestamp_ms < end_ms
    ]


def requests(entries: Iterable[TraceEntry], block_size: int) -> Iterator[tuple[int, Request]]:
    """Arrival in picoseconds and request, numbered from 0."""
    if block_size < BLOCK_SIZE_MIN or TRACE_BLOCK_TOKENS % block_size:
        raise ValueError(
            f"a block size of {block_size}: blocks of {BLOCK_SIZE_MIN} to {TRACE_BLOCK_TOKENS} "
            f"tokens that divide {TRACE_BLOCK_TOKENS} can be made of a trace's"
        )
    split = TRACE_BLOCK_TOKENS // block_size
    for number, entry in enumerate(entries):
        content = TraceContent(entry.hash_ids, split, entry.input_tokens // block_size, number)
        yield (
            round(entry.timestamp_ms * PS_PER_MS),
            Request(number, entry.input_tokens, entry.output_tokens, content),
        )


def _entry(source: str, number: int, line: str) -> TraceEntry:
    if len(line) > LINE_CHARACTERS_MAX:
        raise TraceError(source, number, f"longer than {LINE_CHARACTERS_MAX} characters")
    try:
        read = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TraceError(source, number, f"no JSON: {error}") from error
    if not isinstance(read, dict):
        raise TraceError(source, number, f"a JSON object is needed, not {_kind(read)}")
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    missing = [name for name in names if name not in read]
    if missing:
        raise TraceError(source, number, f"without {', '.join(missing)}")
    timestamp, ids = read["timestamp"], read["hash_ids"]
    if not _is_number(timestamp) or not 0 <= timestamp < float("inf"):
        raise TraceError(source, number, f"timestamp {timestamp!r} is no time in ms from 0 on")
    for name in ("input_length", "output_length"):
        if not _is_whole(read[name]) or read[name] < 1:
            raise TraceError(source, number, f"{name} {read[name]!r} is no number of tokens from 1")
    if not isinstance(ids, list):
        raise TraceError(source, number, f"hash_ids must be a list, not {_kind(ids)}")
    wrong = next((i for i in ids if not _is_whole(i) or not 0 <= i <= ID_MAX), None)
    if wrong is not None:
        raise TraceError(
            source, number, f"hash_ids: {wrong!r} is no whole number from 0 to {ID_MAX}"
        )
    expected = -(-read["input_length"] // TRACE_BLOCK_TOKENS)
    if len(ids) != expected:
        problem = f"{len(ids)} hash_ids, {read['input_length']} tokens of input need {expected}"
        raise TraceError(source, number, problem)
    return TraceEntry(timestamp, read["input_length"], read["output_length"], tuple(ids))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return type(value).__name__
