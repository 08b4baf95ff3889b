"""What the demo measures: the same prompts, answered from every place their KV can come from.

Each measurement is one streamed request. Where its KV came from is not assumed: it is read from
the daemon's counters, before and after. A row is the median over the documents, and it is only
right if every document was answered with the same tokens as when it was cold, from the tier
that was meant.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.demo.client import Answer, Message
from examples.demo.engine import Engine
from examples.demo.routed import REUSE_MIN, Routed
from examples.demo.stack import Stack
from examples.demo.texts import Document, conversation, documents, warm_up

COLD, G1, G2, G3, G4, OTHER = "cold", "G1", "G2", "G3", "G4", "other-engine"
SOURCES = (COLD, G1, G2, OTHER, G3, G4)
# Which of the daemon's tiers must be seen to serve a row; none where the engine needs no help.
SERVED_BY: dict[str, str | None] = {COLD: None, G1: None, G2: G2, OTHER: G2, G3: G3, G4: G4}
MAX_TOKENS = 24
REPORT_DELAY_S = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One document answered once."""

    source: str
    document: str
    answer: Answer
    served_by: frozenset[str]
    output_equal: bool

    def fault(self, block_tokens: int) -> str | None:
        """Why this is not what the row claims, as a sentence; None if it is."""
        expected = SERVED_BY[self.source]
        what = f"{self.source}, document {self.document!r}"
        if not self.output_equal:
            return f"{what}: the answer differs from the cold one"
        if self.served_by != ({expected} if expected else set()):
            seen = ", ".join(sorted(self.served_by)) or "no tier of the daemon"
            return f"{what}: served by {seen} instead of {expected or 'the engine alone'}"
        reused, whole = self.answer.cached_tokens, self.answer.prompt_tokens // block_tokens
        if self.source == COLD and reused:
            return f"{what}: {reused} tokens reused of a text that was never seen"
        if self.source != COLD and reused < REUSE_MIN * whole * block_tokens:
            return f"{what}: only {reused} of {self.answer.prompt_tokens} tokens reused"
        return None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians over the documents, with the extremes beside."""

    source: str
    ttft_s: float
    ttft_s_min: float
    ttft_s_max: float
    prompt_tokens: int
    tokens_reused: int
    output_equal: bool
    served_by: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the conversation: who answered it, and how much of it was known."""

    number: int
    engine: str
    ttft_s: float
    prompt_tokens: int
    tokens_reused: int
    question: str
    text: str


class Demo:
    """The measurements, in the order in which each source comes to hold the documents."""

    def __init__(self, stack: Stack, say: Say, document_count: int) -> None:
        self._stack = stack
        self._say = say
        self._documents = documents(document_count)
        self._cold: dict[str, tuple[int, ...]] = {}
        self.samples: list[Sample] = []
        self.turns: list[Turn] = []
        self.routed = Routed(stack, say)

    def run(self) -> None:
        first, second = self._stack.engines
        self._warm_up(first, second)
        for document in self._documents:
            self._say(f"{document.title!r}: cold, then its repeat, then from host memory")
            self._measure(COLD, first, document)
            self._measure(G1, first, document)
            self._stack.settle()
            first.forget()
            self._measure(G2, first, document)
            self._measure(OTHER, second, document)
        self._converse(first, second)
        self.routed.run()
        self._stack.settle()
        self._say("daemon stopped and started: host memory is empty, the SSD is not")
        self._stack.restart_daemon(empty_ssd=False)
        self._measure_all(G3, first)
        self._say("daemon stopped, SSD emptied, daemon started: only S3 is left")
        self._stack.restart_daemon(empty_ssd=True)
        self._measure_all(G4, first)

    def rows(self) -> list[Row]:
        by_source: dict[str, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            by_source[sample.source].append(sample)
        return [_row(source, by_source[source]) for source in SOURCES if by_source[source]]

    def faults(self) -> list[str]:
        """Everything that is not as it should be, as sentences."""
        block_tokens = self._stack.block_tokens
        found = [sample.fault(block_tokens) for sample in self.samples]
        found += [_turn_fault(earlier, later, block_tokens) for earlier, later in self._pairs()]
        found += [row.fault() for row in self.routed.rows]
        return [fault for fault in found if fault is not None]

    def _warm_up(self, *engines: Engine) -> None:
        self._say("warming both engines up with another text")
        for engine in engines:
            # Computed by each, so that how fast it computes is known: a salt of its own keeps
            # the one from loading what the other has stored.
            engine.complete(warm_up(), max_tokens=4, cache_salt=engine.name)
            engine.complete(warm_up(), max_tokens=4)
            self._stack.settle()
            engine.forget()
            engine.complete(warm_up(), max_tokens=4)

    def _measure_all(self, source: str, engine: Engine) -> None:
        engine.forget()
        for document in self._documents:
            self._measure(source, engine, document)

    def _measure(self, source: str, engine: Engine, document: Document) -> None:
        before = self._stack.daemon.loaded_bytes()
        answer = engine.complete(document.prompt, max_tokens=MAX_TOKENS)
        # An engine reports what it loaded when it is done with it, a moment after its answer.
        time.sleep(REPORT_DELAY_S)
        after = self._stack.daemon.loaded_bytes()
        known = self._cold.setdefault(document.title, answer.tokens)
        self.samples.append(
            Sample(
                source=source,
                document=document.title,
                answer=answer,
                served_by=_served_by(before, after),
                output_equal=answer.tokens == known,
            )
        )
        reused = f"{answer.cached_tokens} of {answer.prompt_tokens} tokens reused"
        self._say(f"  {source:<12} {answer.ttft_s:7.3f} s to the first token, {reused}")

    def _converse(self, *engines: Engine) -> None:
        """Turns go to the engines in turn, as a load balancer that knows nothing would do it."""
        self._say("a conversation whose turns go to one engine and the other")
        beginning, questions = conversation()
        messages: list[Message] = [{"role": "system", "content": beginning}]
        for index, question in enumerate(questions):
            engine = engines[index % len(engines)]
            messages.append({"role": "user", "content": question})
            answer = engine.chat(messages, max_tokens=48)
            messages.append({"role": "assistant", "content": answer.text})
            self._stack.settle()
            turn = Turn(
                number=index + 1,
                engine=engine.name,
                ttft_s=answer.ttft_s,
                prompt_tokens=answer.prompt_tokens,
                tokens_reused=answer.cached_tokens,
                question=question,
                text=answer.text,
            )
            self.turns.append(turn)
            reused = f"{turn.tokens_reused} of {turn.prompt_tokens} tokens reused"
            self._say(f"  turn {turn.number} on {turn.engine}: {turn.ttft_s:7.3f} s, {reused}")

    def _pairs(self) -> list[tuple[Turn, Turn]]:
        return list(zip(self.turns, self.turns[1:], strict=False))


def _row(source: str, samples: list[Sample]) -> Row:
    times_s = [sample.answer.ttft_s for sample in samples]
    served_by = sorted(set().union(*(sample.served_by for sample in samples)))
    return Row(
        source=source,
        ttft_s=statistics.median(times_s),
        ttft_s_min=min(times_s),
        ttft_s_max=max(times_s),
        prompt_tokens=int(statistics.median(sample.answer.prompt_tokens for sample in samples)),
        tokens_reused=int(statistics.median(sample.answer.cached_tokens for sample in samples)),
        output_equal=all(sample.output_equal for sample in samples),
        served_by=", ".join(served_by) or "-",
    )


def _served_by(before: Mapping[str, int], after: Mapping[str, int]) -> frozenset[str]:
    """The tiers that were read. What comes from below passes G2, which then is not its source."""
    read = {tier for tier in after if after[tier] > before.get(tier, 0)}
    return frozenset(read - {G2} if {G2} < read else read)


def _turn_fault(earlier: Turn, later: Turn, block_tokens: int) -> str | None:
    known = earlier.prompt_tokens // block_tokens * block_tokens
    if later.tokens_reused >= REUSE_MIN * known:
        return None
    return (
        f"turn {later.number} on {later.engine}: only {later.tokens_reused} tokens reused, "
        f"though the turn before had {known} in whole blocks"
    )
