"""A mock engine: continuous batching, paged blocks and a prefix cache, without a model.

Scheduling follows vLLM's V1 scheduler: first come first served; one budget of tokens a step for
decodes and chunks of prefills; blocks are allocated as tokens need them; when none is left the
request that was admitted last is preempted, and computed anew later; blocks in lower tiers are
loaded while other requests go on. It is a state machine under the caller's clock (picoseconds, see
timing.py): `start` plans a step, `finish` ends it at the time that `start` told. Events and
records come out through callbacks, in the order of their times.

Rows of decode steps in which nothing can change are planned as one (`bulk`). `sync` accounts for
those that have ended, `submit` and `cancel` cut the row after the step that runs. All times, events
and states seen at any time are exactly those of single steps.

Approximations: generated blocks are registered, told of and offloaded when their request ends or
is preempted, not one by one. Promotion to G2 happens when the engine next begins a step after the
load. A cancelled request's blocks are free at once, also while they are being loaded. Offloading
costs nothing. Bounded by `waiting_max`; a request that is refused says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from mocker.cache import BlockPool
from mocker.events import BlocksRemoved, Emit
from mocker.plan import Plan
from mocker.sequence import Outcome, Record, Request, Sequence, StepLog
from mocker.tiers import Found, Link, LowerTiers, emit_runs
from mocker.timing import StepTiming, TierTiming, pairs

WAITING_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Names and meanings are vLLM's where it has them."""

    timing: StepTiming
    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_bytes_per_token: int = 131072
    waiting_max: int = WAITING_MAX
    bulk: bool = True

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.block_size, self.max_num_seqs, self.waiting_max) < 1:
            raise ValueError("blocks, block size, sequences and the queue must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is less than "
                f"max_num_seqs ({self.max_num_seqs}): not every sequence could decode"
            )


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request will never run here, or not now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Output:
    """One token of a request. The times of tokens in a row of steps are in its record."""

    request_id: int
    number: int  # of the answer's tokens, from 0
    last: bool


class Engine:
    def __init__(
        self,
        settings: EngineSettings,
        *,
        index: int = 0,
        tiers: LowerTiers | None = None,
        emit: Emit | None = None,
        on_end: Callable[[Record], None] | None = None,
    ) -> None:
        self.settings = settings
        self.index = index
        self.node = tiers.node if tiers else 0
        self.pool = BlockPool(settings.num_blocks)
        self.preemptions_total = 0
        self.refused_total = 0
        self.busy_ps = 0
        self.steps_total = 0
        self.tokens_computed_total = 0
        self._timing = settings.timing
        self._tiers = tiers
        self._bus = Link(tiers.timing.g2 if tiers else TierTiming().g2)
        self._emit = emit
        self._on_end = on_end
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}
        self._plan: Plan | None = None
        self._log = StepLog()

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Tokens of prompts that are not computed yet, cached or not."""
        everybody = (*self._waiting, *self._running)
        return sum(max(s.request.prompt_tokens - s.computed, 0) for s in everybody)

    def outputs(self) -> Iterator[tuple[int, int]]:
        """Ids of running requests and how many tokens of each answer have come out."""
        return ((s.request.request_id, s.generated) for s in self._running)

    @property
    def end_ps(self) -> int | None:
        """When `finish` is due; None if no step runs."""
        return self._plan.end_ps if self._plan else None

    @property
    def wake_ps(self) -> int | None:
        """When the next load ends, which may allow a step."""
        return min(
            (s.load_end_ps for s in self._waiting if s.load_end_ps is not None), default=None
        )

    def record_of(self, request_id: int) -> Record | None:
        """Of a request that has not ended."""
        sequence = self._by_id.get(request_id)
        return None if sequence is None else sequence.record

    def clear(self, now_ps: int) -> None:
        """As if started anew: G1 is empty. The caller guarantees that it has nothing to do."""
        assert not self._by_id
        kept = list(self.pool.hashes)
        if kept and self._emit:
            self._emit(BlocksRemoved(now_ps, self.index, self.node, "G1", kept))
        self.pool = BlockPool(self.settings.num_blocks)

    def submit(self, request: Request, now_ps: int) -> Refused | None:
        """Queue a request; it is looked at when the next step begins."""
        refused = self._refusal(request)
        if refused:
            self.refused_total += 1
            return refused
        self._cut(now_ps)
        record = Record(
            *(request.request_id, self.index, now_ps, request.prompt_tokens),
            request.output_tokens,
        )
        sequence = Sequence(request, record)
        self._by_id[request.request_id] = sequence
        self._waiting.append(sequence)
        return None

    def cancel(self, request_id: int, now_ps: int) -> bool:
        """End a request and free all it holds; False if it is not here any more."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self._cut(now_ps)
        if sequence.admitted:
            self._running.remove(sequence)
            if self._plan:
                self._unschedule(self._plan, sequence)
        else:
            self._waiting.remove(sequence)
        self._end(sequence, now_ps, "cancelled")
        return True

    def start(self, now_ps: int) -> int | None:
        """Plan what to do from now on; its end, or None if there is nothing to do until `wake_ps`.

        The caller guarantees that no step runs.
        """
        assert self._plan is None
        self._land(now_ps)
        plan = Plan(now_ps, 1, 0, 0, [], [])
        preempted_before = self.preemptions_total
        budget = self._schedule_running(plan, now_ps)
        preempted = self.preemptions_total > preempted_before
        if not preempted or not (plan.decodes or plan.prefills):
            self._admit(plan, budget, now_ps)
        if not plan.decodes and not plan.prefills:
            return None
        for sequence in plan.decodes:
            if sequence.decoding_since is None:  # what was computed anew ended in a decode
                sequence.decoding_since = self._log.end
        self._price(plan)
        if self.settings.bulk and not plan.prefills:
            plan.steps = 1 if preempted else self._row(plan)
        self._plan = plan
        return plan.end_ps

    def sync(self, now_ps: int) -> None:
        """Account for the steps of a row that have ended by now, and the one that has begun.

        The caller guarantees that it has called `finish` if that was due.
        """
        plan = self._plan
        if plan is None or plan.steps == 1:
            return
        ended = min(plan.ended_by(now_ps), plan.steps)
        begun = min(plan.begun_before(now_ps), plan.steps)
        self._advance(plan, ended, max(begun, plan.begun))

    def finish(self) -> list[Output]:
        """End the planned step or row: the tokens of its last step."""
        plan, self._plan = self._plan, None
        assert plan is not None
        now_ps = plan.end_ps
        self._advance(plan, plan.steps - 1, plan.steps)
        self._account(plan, plan.steps - 1, 1)
        outputs: list[Output] = []
        segment = self._log.end - 1
        for sequence, tokens in plan.prefills:
            sequence.computed += tokens
            self._register(sequence, now_ps)
        for sequence in plan.decodes:
            sequence.computed += 1
        for sequence in (*plan.decodes, *(s for s, _ in plan.prefills)):
            if sequence.remaining:
                continue
            if sequence.decoding_since is None:
                sequence.decoding_since = segment
            sequence.generated += 1
            last = sequence.generated == sequence.request.output_tokens
            outputs.append(Output(sequence.request.request_id, sequence.generated - 1, last))
            if last:
                self._running.remove(sequence)
                self._end(sequence, now_ps, "finished")
        self._log.trim(self._oldest_segment)
        return outputs

    def check_integrity(self) -> None:
        """Raises AssertionError where blocks are held by nobody or by too many."""
        self.pool.check_integrity()
        held = [block for s in (*self._waiting, *self._running) for block in s.blocks]
        assert len(set(held)) == self.pool.used_count
        assert len(self._running) <= self.settings.max_num_seqs
        assert len(self._waiting) + len(self._running) == len(self._by_id)
        for sequence in self._running:
            capacity = len(sequence.blocks) * self.settings.block_size
            assert sequence.computed <= capacity
            assert sequence.registered <= len(sequence.blocks)
        if self._tiers:
            self._tiers.check_integrity()

    # ---- scheduling

    def _refusal(self, request: Request) -> Refused | None:
        tokens = request.prompt_tokens + request.output_tokens - 1
        blocks = self._blocks_for(tokens)
        if blocks > self.settings.num_blocks:
            return Refused(f"needs {blocks} blocks, the engine has {self.settings.num_blocks}")
        if len(self._waiting) >= self.settings.waiting_max:
            return Refused(f"{len(self._waiting)} requests wait already")
        if request.request_id in self._by_id:
            return Refused(f"request {request.request_id} is here already")
        return None

    def _schedule_running(self, plan: Plan, now_ps: int) -> int:
        """Decodes before prefills, each in the order of admission; what is left of the budget.

        A decode is never left out for want of budget, as `max_num_seqs` fits into it.
        """
        budget = self.settings.max_num_batched_tokens
        for decodes in (True, False):
            for sequence in [s for s in self._running if s.decodes == decodes]:
                if not sequence.admitted:  # preempted meanwhile
                    continue
                tokens = min(sequence.remaining, budget)
                if tokens == 0 or not self._grow(plan, sequence, tokens, now_ps):
                    continue
                budget -= tokens
                if decodes:
                    plan.decodes.append(sequence)
                else:
                    plan.prefills.append((sequence, tokens))
        taken = len(plan.decodes) + sum(tokens for _, tokens in plan.prefills)
        return self.settings.max_num_batched_tokens - taken

    def _grow(self, plan: Plan, sequence: Sequence, tokens: int, now_ps: int) -> bool:
        """Have blocks for more tokens; the last admitted are preempted, it itself at worst."""
        need = self._blocks_for(sequence.computed + tokens) - len(sequence.blocks)
        while need > self.pool.free_count:
            victim = self._running.pop()
            self._unschedule(plan, victim)
            self._preempt(victim, now_ps)
            if victim is sequence:
                return False
        self._allocate(sequence, need, now_ps)
        return True

    def _admit(self, plan: Plan, budget: int, now_ps: int) -> None:
        """Waiting requests in order, passing over those that load, up to the first that must wait.

        There must be room for the whole prompt, though blocks are allocated by chunks. So whoever
        must wait for blocks goes on waiting while others only decode, whatever the tiers gain or
        lose meanwhile.
        """
        passed: list[Sequence] = []
        while self._waiting and budget and len(self._running) < self.settings.max_num_seqs:
            sequence = self._waiting[0]
            if sequence.load_end_ps is None:
                if not self._place(sequence, now_ps):
                    if self._running or not self._release_holder(now_ps):
                        break
                    continue
                if sequence.load_end_ps is None:
                    tokens = min(sequence.remaining, budget)
                    budget -= tokens
                    need = self._blocks_for(sequence.computed + tokens) - len(sequence.blocks)
                    self._allocate(sequence, need, now_ps)
                    sequence.admitted = True
                    self._running.append(self._waiting.popleft())
                    plan.prefills.append((sequence, tokens))
                    continue
            passed.append(self._waiting.popleft())
        self._waiting.extendleft(reversed(passed))

    def _place(self, sequence: Sequence, now_ps: int) -> bool:
        """Give a waiting request its cached blocks, or begin to load them, if its prompt fits."""
        size = self.settings.block_size
        room = self._blocks_for(sequence.known_tokens)
        if sequence.blocks:  # its load has ended
            return room - len(sequence.blocks) <= self.pool.free_count
        reusable = (sequence.known_tokens - 1) // size  # one token at least is computed
        chain = sequence.request.chain
        chain.extend(reusable)
        hits = self.pool.match(chain.hashes, reusable)
        if room - len(hits) > self.pool.free_count - self.pool.free_among(hits):
            return False
        runs = self._tiers.find(chain.hashes, len(hits), reusable) if self._tiers else []
        self.pool.take(hits)
        sequence.blocks = hits
        sequence.computed = len(hits) * size
        sequence.registered = len(hits)
        record = sequence.record
        if record.scheduled_ps is None:
            record.scheduled_ps = now_ps
            record.cached_tokens["G1"] = len(hits) * size
            for run in runs:
                tokens = run.blocks * size
                record.cached_tokens[run.tier] = record.cached_tokens.get(run.tier, 0) + tokens
        if runs:
            self._load(sequence, runs, now_ps)
        return True

    def _load(self, sequence: Sequence, runs: list[Found], now_ps: int) -> None:
        assert self._tiers is not None
        first = len(sequence.blocks)
        sequence.loaded_blocks = sum(run.blocks for run in runs)
        hashes = sequence.request.chain.hashes[first : first + sequence.loaded_blocks]
        block_bytes = self.settings.block_size * self.settings.kv_bytes_per_token
        sequence.load_end_ps = self._tiers.load(now_ps, self._bus, runs, hashes, block_bytes)
        self._allocate(sequence, sequence.loaded_blocks, now_ps)

    def _release_holder(self, now_ps: int) -> bool:
        """Nothing runs and the first cannot: the last that holds loaded blocks gives them back."""
        for sequence in reversed(self._waiting):
            if (
                sequence.blocks
                and sequence.load_end_ps is None
                and sequence is not self._waiting[0]
            ):
                self._forget(sequence, now_ps)
                return True
        return False

    def _land(self, now_ps: int) -> None:
        """Loads that have ended: their blocks are whole and can be shared."""
        for sequence in self._waiting:
            if sequence.load_end_ps is None or sequence.load_end_ps > now_ps:
                continue
            sequence.load_end_ps = None
            sequence.computed += sequence.loaded_blocks * self.settings.block_size
            first = sequence.registered
            self._register(sequence, now_ps, offload=False)
            if self._tiers:
                chain = sequence.request.chain
                self._tiers.promote(now_ps, self.index, chain, first, sequence.registered)

    # ---- rows of steps

    def _price(self, plan: Plan) -> None:
        prefill_tokens = sum(tokens for _, tokens in plan.prefills)
        prefill_pairs = sum(pairs(tokens, s.computed) for s, tokens in plan.prefills)
        kv_tokens = sum(s.computed for s in plan.decodes) + len(plan.decodes)
        plan.first_ps = self._timing.step_ps(
            prefill_tokens, prefill_pairs, len(plan.decodes), kv_tokens
        )
        plan.growth_ps = self._timing.kv_token_ps * len(plan.decodes)

    def _row(self, plan: Plan) -> int:
        """How many steps to take at once: until a request ends, a load ends, or blocks run out."""
        most = min(s.request.output_tokens - s.generated for s in plan.decodes)
        wake_ps = self.wake_ps
        if wake_ps is not None:
            most = min(most, plan.begun_before(wake_ps))
        free = self.pool.free_count
        if self._row_blocks(plan, most) <= free:
            return most
        least = 1  # the first step has its blocks already
        while most - least > 1:
            middle = (least + most) // 2
            if self._row_blocks(plan, middle) <= free:
                least = middle
            else:
                most = middle
        return least

    def _row_blocks(self, plan: Plan, steps: int) -> int:
        """Blocks to allocate during so many steps."""
        size = self.settings.block_size
        return sum(-(-(s.computed + steps) // size) - len(s.blocks) for s in plan.decodes)

    def _advance(self, plan: Plan, ended: int, begun: int) -> None:
        """Account for a row up to these numbers; blocks go in the order of single steps."""
        size = self.settings.block_size
        if begun > plan.begun:
            needs = [
                (step, order)
                for order, s in enumerate(plan.decodes)
                for step in range(
                    plan.begun + -(s.computed - plan.ended + plan.begun) % size, begun, size
                )
            ]
            for step, order in sorted(needs):
                self._allocate(plan.decodes[order], 1, plan.begin_of(step))
            plan.begun = begun
        steps = ended - plan.ended
        if steps > 0:
            self._account(plan, plan.ended, steps)
            for sequence in plan.decodes:
                sequence.computed += steps
                sequence.generated += steps
            plan.ended = ended

    def _account(self, plan: Plan, first: int, steps: int) -> None:
        begin_ps = plan.begin_of(first)
        duration_ps = plan.first_ps + first * plan.growth_ps
        self._log.add(begin_ps, steps, duration_ps, plan.growth_ps)
        self.busy_ps += plan.begin_of(first + steps) - begin_ps
        self.steps_total += steps
        tokens = sum(tokens for _, tokens in plan.prefills) + len(plan.decodes)
        self.tokens_computed_total += tokens * steps

    def _cut(self, now_ps: int) -> None:
        """End a row with the step that runs now, so that the next one can see what is new."""
        self.sync(now_ps)
        plan = self._plan
        if plan is None or plan.steps == 1:
            return
        plan.steps = plan.begun
        if plan.ended == plan.begun:  # it ended this very moment
            self._plan = None

    # ---- blocks

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size)

    def _allocate(self, sequence: Sequence, count: int, at_ps: int) -> None:
        blocks, evicted = self.pool.allocate(count)
        sequence.blocks += blocks
        if evicted and self._emit:
            self._emit(BlocksRemoved(at_ps, self.index, self.node, "G1", evicted))

    def _register(self, sequence: Sequence, at_ps: int, *, offload: bool = True) -> None:
        """Make whole blocks known to the pool, to listeners and to the tiers below."""
        first, end = sequence.registered, sequence.computed // self.settings.block_size
        if first >= end:
            return
        chain = sequence.request.chain
        chain.extend(end)
        new = [
            i for i in range(first, end) if self.pool.register(sequence.blocks[i], chain.hashes[i])
        ]
        sequence.registered = end
        if new and self._emit:
            emit_runs(self._emit, (at_ps, self.index, self.node, "G1"), chain, new)
        if offload and self._tiers:
            self._tiers.store(at_ps, self.index, chain, first, end)

    def _preempt(self, sequence: Sequence, now_ps: int) -> None:
        self.preemptions_total += 1
        sequence.record.preemptions += 1
        self._forget(sequence, now_ps)
        self._waiting.appendleft(sequence)

    def _forget(self, sequence: Sequence, now_ps: int) -> None:
        """Give all blocks back; what was whole stays in the cache for as long as it lasts."""
        if sequence.load_end_ps is None:
            self._register(sequence, now_ps)
        self._note_times(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.registered = sequence.loaded_blocks = 0
        sequence.load_end_ps = None
        sequence.admitted = False

    def _end(self, sequence: Sequence, now_ps: int, outcome: Outcome) -> None:
        self._forget(sequence, now_ps)
        del self._by_id[sequence.request.request_id]
        record = sequence.record
        record.outcome = outcome
        record.finished_ps = now_ps
        assert len(record.token_times_ps) == sequence.generated
        if self._on_end:
            self._on_end(record)

    def _note_times(self, sequence: Sequence) -> None:
        if sequence.decoding_since is None:
            return
        record = sequence.record
        times_ps = self._log.times_ps(sequence.decoding_since, record.arrival_ps)
        record.token_times_ps = np.concatenate((record.token_times_ps, times_ps))
        sequence.decoding_since = None

    def _oldest_segment(self) -> int:
        since = (s.decoding_since for s in self._running)
        return min((first for first in since if first is not None), default=self._log.end)

    @staticmethod
    def _unschedule(plan: Plan, sequence: Sequence) -> None:
        if sequence in plan.decodes:
            plan.decodes.remove(sequence)
        plan.prefills = [entry for entry in plan.prefills if entry[0] is not sequence]


def single_steps(engine: Engine, now_ps: int) -> Iterator[tuple[int, list[Output]]]:
    """Run an engine alone until it has nothing to do: the end of each step and its tokens."""
    while True:
        end_ps = engine.start(now_ps)
        if end_ps is None:
            wake_ps = engine.wake_ps
            if wake_ps is None:
                return
            now_ps = wake_ps
            continue
        yield end_ps, engine.finish()
        now_ps = end_ps
