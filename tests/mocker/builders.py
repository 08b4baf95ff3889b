"""Small engines with round figures, and requests of blocks named by numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from mocker.content import TraceContent
from mocker.engine import Engine, EngineSettings, single_steps
from mocker.sequence import Record, Request
from mocker.timing import StepTiming

BLOCK: Final = 4
TIMING: Final = StepTiming(overhead_ps=10, weights_ps=100, token_ps=20, pair_ps=2, kv_token_ps=3)
SETTINGS: Final = EngineSettings(
    TIMING,
    num_blocks=64,
    block_size=BLOCK,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    kv_bytes_per_token=1,
)


def settings(**other: Any) -> EngineSettings:
    return replace(SETTINGS, **other)


def request(number: int, ids: Sequence[int], outputs: int, prompt: int | None = None) -> Request:
    """A prompt of these blocks; `prompt` tokens of them if the last is not whole."""
    tokens = len(ids) * BLOCK if prompt is None else prompt
    return Request(number, tokens, outputs, TraceContent(ids, 1, tokens // BLOCK, number))


def ended(engine: Engine, requests: Iterable[Request], now_ps: int = 0) -> dict[int, Record]:
    """Submit all at once and run the engine until it is idle."""
    found: list[Record] = []
    engine._on_end = found.append
    for each in requests:
        assert engine.submit(each, now_ps) is None
    for _ in single_steps(engine, now_ps):
        engine.check_integrity()
    return {record.request_id: record for record in found}


def times(record: Record) -> list[int]:
    found: list[int] = (record.token_times_ps + record.arrival_ps).tolist()
    return found
