"""Times the engine's steps that do nothing but prefill, for the engine's pace.

The scheduler half notes when it hands such a step out, with a number that travels to the workers
and back with the step's result. Steps may overlap: a step begins when it is handed out, or when
the one before it has ended if that is later.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from vllm.v1.core.sched.output import SchedulerOutput

from kvbm.pace import PREFILL_TOKENS_MIN, EnginePace

PREFILL_SHARE_MIN: Final = 0.95
STEPS_MAX: Final = 16
"""Steps under way that are remembered; a pipeline has fewer."""


@dataclass(frozen=True, slots=True)
class _Step:
    began_at: float
    spans: list[tuple[int, int]]


class StepTimer:
    """Feeds an `EnginePace`. All calls from the scheduler's thread."""

    def __init__(self, pace: EnginePace, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = pace
        self._clock = clock
        self._steps: OrderedDict[int, _Step] = OrderedDict()
        self._next = 0
        self._ended_at = 0.0

    def handed_out(self, output: SchedulerOutput) -> int:
        """A step begins; its number if its result is to come back with it, else 0."""
        spans = prefill_spans(output)
        tokens = sum(count for _, count in spans)
        enough = max(PREFILL_TOKENS_MIN, PREFILL_SHARE_MIN * output.total_num_scheduled_tokens)
        if tokens < enough:
            return 0
        self._next += 1
        self._steps[self._next] = _Step(self._clock(), spans)
        if len(self._steps) > STEPS_MAX:
            self._steps.popitem(last=False)
        return self._next

    def ended(self, numbers: Collection[int]) -> None:
        """A step's result is here: that of these numbered ones, or of none of them."""
        now = self._clock()
        for number in numbers:
            step = self._steps.pop(number, None)
            if step is not None:
                self._pace.note_prefill(step.spans, now - max(step.began_at, self._ended_at))
        self._ended_at = now


def prefill_spans(output: SchedulerOutput) -> list[tuple[int, int]]:
    """(position, tokens) of each prompt's part in a step."""
    counts = output.num_scheduled_tokens
    spans = [
        (new.num_computed_tokens, counts.get(new.req_id, 0)) for new in output.scheduled_new_reqs
    ]
    cached = output.scheduled_cached_reqs
    rows = zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True)
    # A preempted request computes its own answer again, which is prefill as well.
    spans += [
        (position, counts.get(req_id, 0))
        for req_id, position, answered in rows
        if not answered or req_id in cached.resumed_req_ids
    ]
    return spans
