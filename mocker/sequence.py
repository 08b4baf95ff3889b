"""A request, what an engine keeps of it while it works on it, and what remains when it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from mocker.content import Chain, Content
from mocker.events import Tier

Outcome = Literal["finished", "cancelled"]

TRIM_SEGMENTS: Final = 8192


@dataclass(slots=True)
class Request:
    """`output_tokens` is how many the engine generates: there is no model that might stop."""

    request_id: int
    prompt_tokens: int
    output_tokens: int
    content: Content
    chain: Chain = field(init=False)

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.request_id}: a prompt of {self.prompt_tokens} and an answer of "
                f"{self.output_tokens} tokens; each needs at least one"
            )
        self.chain = Chain(self.content)


@dataclass(slots=True)
class Record:
    """What became of a request. Times are picoseconds of the engine's clock, which may be large;
    those of tokens count from the arrival, and fit 64 bits.
    """

    request_id: int
    engine: int
    arrival_ps: int
    prompt_tokens: int
    output_tokens: int
    outcome: Outcome | None = None  # None while it is worked on
    scheduled_ps: int | None = None  # its first step or load began
    finished_ps: int | None = None
    cached_tokens: dict[Tier, int] = field(default_factory=dict)  # when first scheduled
    preemptions: int = 0
    token_times_ps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def ttft_ps(self) -> int | None:
        return int(self.token_times_ps[0]) if len(self.token_times_ps) else None

    @property
    def itls_ps(self) -> np.ndarray:
        return np.diff(self.token_times_ps)

    @property
    def e2e_ps(self) -> int | None:
        return None if self.finished_ps is None else self.finished_ps - self.arrival_ps


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in an engine. `computed` tokens of KV are in `blocks`, `generated` came out."""

    request: Request
    record: Record
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    generated: int = 0
    admitted: bool = False  # among the running, not the waiting
    registered: int = 0  # leading blocks whose content is known to the pool
    load_end_ps: int | None = None  # its blocks are being loaded until then
    loaded_blocks: int = 0
    decoding_since: int | None = None  # the segment of the log with its first token in a row

    @property
    def known_tokens(self) -> int:
        """Tokens whose KV is needed before the next one can come out."""
        return self.request.prompt_tokens + self.generated

    @property
    def remaining(self) -> int:
        return self.known_tokens - self.computed

    @property
    def decodes(self) -> bool:
        return self.generated > 0 and self.remaining == 1


class StepLog:
    """When tokens came out, once for all sequences of an engine.

    A segment is a row of steps: where the first began, how many, how long the first took, and by
    how much each next one took longer. A decoding sequence gets a token at the end of every step
    from its first token until it ends or is preempted, so a range of segments tells all its times.
    """

    def __init__(self) -> None:
        self._begins_ps: list[int] = []
        self._steps: list[int] = []
        self._firsts_ps: list[int] = []
        self._growths_ps: list[int] = []
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def end(self) -> int:
        return self._dropped + len(self._steps)

    def add(self, begin_ps: int, steps: int, first_ps: int, growth_ps: int) -> None:
        self._begins_ps.append(begin_ps)
        self._steps.append(steps)
        self._firsts_ps.append(first_ps)
        self._growths_ps.append(growth_ps)

    def times_ps(self, first: int, origin_ps: int) -> np.ndarray:
        """Ends of all steps of the segments from `first` on, since `origin_ps`."""
        begin = first - self._dropped
        assert begin >= 0
        steps = np.array(self._steps[begin:], np.int64)
        starts = np.array([at_ps - origin_ps for at_ps in self._begins_ps[begin:]], np.int64)
        firsts = np.array(self._firsts_ps[begin:], np.int64)
        growths = np.array(self._growths_ps[begin:], np.int64)
        before = np.repeat(np.cumsum(steps) - steps, steps)
        number = np.arange(1, len(before) + 1) - before
        times: np.ndarray = (
            np.repeat(starts, steps)
            + number * np.repeat(firsts, steps)
            + np.repeat(growths, steps) * (number * (number - 1) // 2)
        )
        return times

    def trim(self, oldest: Callable[[], int]) -> None:
        """Forget segments before the oldest that is still needed, now and then."""
        if len(self._steps) >= TRIM_SEGMENTS:
            drop = oldest() - self._dropped
            for column in (self._begins_ps, self._steps, self._firsts_ps, self._growths_ps):
                del column[:drop]
            self._dropped += drop
