"""The demo's routed part: conversations through the frontend, an engine chosen for each turn.

Two conversations that share a long system prompt. Before each request the router is asked where it
would go and why; afterwards the answer says where it went, and what was reused there. At the end
every request is computed once more without any cache: the answers must be the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from examples.demo.client import Answer, Message
from examples.demo.frontend import Candidate
from examples.demo.stack import Stack
from examples.demo.texts import routed_conversations

MAX_TOKENS = 32
# Of what was computed before. Not all: under load an engine may drop a block rather than wait.
REUSE_MIN = 0.98

_UNSURE = {"assumed": " at an assumed speed"}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RoutedRow:
    """One request: where it went, why, and what it found there."""

    request: str
    engine: str
    ttft_s: float
    prompt_tokens: int
    tokens_known: int  # of the prompt, in whole blocks, that some earlier request had
    tokens_expected: int  # of the prompt, at hand in some tier, by the frontend
    tokens_reused: int  # by the engine
    why: str
    is_where_kv_is: bool  # no other engine had more of the prompt at hand, in whatever tier
    is_soonest: bool  # no other engine was expected to have its first token sooner
    output_equal: bool

    def fault(self) -> str | None:
        """What is not as it should be, as a sentence; None if nothing."""
        what = f"routed, {self.request}, on {self.engine}"
        if not self.output_equal:
            return f"{what}: the answer differs from the one computed without a cache"
        if not self.is_where_kv_is:
            return f"{what}: another engine had more of it at hand ({self.why})"
        if not self.is_soonest:
            return f"{what}: another engine was expected to answer sooner ({self.why})"
        known = min(self.tokens_expected, self.tokens_reused)
        if known < REUSE_MIN * self.tokens_known:
            return (
                f"{what}: {self.tokens_expected} tokens expected and {self.tokens_reused} reused, "
                f"though {self.tokens_known} had been computed before"
            )
        return None


@dataclass(frozen=True, slots=True)
class _Sent:
    messages: Sequence[Message]
    tokens: Sequence[int]
    answer: Answer


class Routed:
    def __init__(self, stack: Stack, say: Say) -> None:
        self._stack = stack
        self._say = say
        self._sent: list[_Sent] = []
        self.rows: list[RoutedRow] = []

    def run(self) -> None:
        self._say("two conversations through the frontend, which chooses an engine for each turn")
        beginning, conversations = routed_conversations()
        for name, questions in conversations.items():
            messages: list[Message] = [{"role": "system", "content": beginning}]
            for number, question in enumerate(questions, 1):
                messages.append({"role": "user", "content": question})
                answer = self._ask(f"conversation {name}, turn {number}", messages)
                messages.append({"role": "assistant", "content": answer.text})
        self._say("the same requests, computed without any cache")
        self.rows = [
            replace(row, output_equal=self._cold(sent) == sent.answer.tokens)
            for row, sent in zip(self.rows, self._sent, strict=True)
        ]

    def _ask(self, request: str, messages: Sequence[Message]) -> Answer:
        frontend, block = self._stack.frontend, self._stack.block_tokens
        tokens = frontend.client.chat_tokens(messages)
        names = self._stack.engine_names()
        candidates = frontend.explain(tokens, MAX_TOKENS)
        answer = frontend.client.chat(messages, max_tokens=MAX_TOKENS)
        row = RoutedRow(
            request=request,
            engine=names.get(answer.worker, answer.worker),
            ttft_s=answer.ttft_s,
            prompt_tokens=answer.prompt_tokens,
            tokens_known=self._known(tokens),
            tokens_expected=answer.expected_cached_tokens,
            tokens_reused=answer.cached_tokens,
            why=why(candidates, names, len(tokens)),
            is_where_kv_is=is_where_kv_is(candidates, answer.worker),
            is_soonest=is_soonest(candidates, answer.worker),
            output_equal=False,  # not known yet
        )
        self.rows.append(row)
        self._say(f"  {request}: {row.engine}, {row.ttft_s:.3f} s; before: {row.why}")
        # What comes next is to find all of this: in the engine's memory, and below it.
        frontend.wait_heard(answer.worker, tokens, len(tokens) // block * block)
        self._stack.settle()
        self._sent.append(_Sent(tuple(messages), tokens, answer))
        return answer

    def _cold(self, sent: _Sent) -> tuple[int, ...]:
        """What an engine answers that knows nothing: a salt of its own keeps every cache out."""
        engine, salt = self._stack.engines[0], secrets.token_hex(16)
        answer = engine.chat(sent.messages, max_tokens=MAX_TOKENS, cache_salt=salt)
        assert not answer.cached_tokens, "a salt that nobody had before"
        return answer.tokens

    def _known(self, tokens: Sequence[int]) -> int:
        block = self._stack.block_tokens
        longest = max((_in_common(tokens, sent.tokens) for sent in self._sent), default=0)
        return longest // block * block


def why(candidates: Sequence[Candidate], names: Mapping[str, str], tokens: int) -> str:
    """One sentence: what each engine had, and how soon it was expected to answer."""
    return "; ".join(
        f"{names.get(one.worker, one.worker)}: {_at_hand(one, tokens)}, "
        f"first token in {one.first_token_s:.2f} s{_UNSURE.get(one.speed_from, '')}"
        for one in candidates
    )


def is_where_kv_is(candidates: Sequence[Candidate], worker: str) -> bool:
    at_hand = {one.worker: one.tokens for one in candidates}
    return at_hand.get(worker) == max(at_hand.values(), default=0)


def is_soonest(candidates: Sequence[Candidate], worker: str) -> bool:
    expected_s = {one.worker: one.first_token_s for one in candidates}
    return expected_s.get(worker) == min(expected_s.values(), default=0.0)


def _at_hand(one: Candidate, tokens: int) -> str:
    found = {tier: count for tier, count in one.tokens_by_tier.items() if count}
    parts = [f"{count:,} in {tier.upper()}" for tier, count in found.items()]
    return f"{' and '.join(parts) or 'none'} of {tokens:,} tokens"


def _in_common(some: Sequence[int], others: Sequence[int]) -> int:
    pairs = enumerate(zip(some, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(some), len(others)))
