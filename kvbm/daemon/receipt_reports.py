"""What the admin API answers about receipts and about loading against computing."""

from __future__ import annotations

from pydantic import BaseModel

from kvbm.daemon.view import GovernorStatus, LineStatus, PaceStatus
from kvbm.governor import Choice, Line, Verdict
from kvbm.protocol import Late, Outcome, State
from kvbm.receipts import GroupReceipt, Receipt


class Governor(BaseModel):
    mode: str
    tiers: list[LineStatus]
    engines: list[PaceStatus]

    @classmethod
    def of(cls, status: GovernorStatus) -> Governor:
        return cls(mode=status.mode, tiers=list(status.tiers), engines=list(status.engines))


class RemovedReport(BaseModel):
    tier: str
    reason: str
    chunks: int
    last_at: float


class GroupReport(BaseModel):
    """One cache group: the chunks asked for are the sum of all counts that follow `missing`."""

    tokens_per_chunk: int
    window: int
    chunk_bytes: int
    asked: int
    kept: dict[str, int]
    first_missing: int | None
    missing: int
    removed: list[RemovedReport]
    behind_gap: int
    skipped: dict[str, int]
    outside_window: int
    queue_full: int
    here: int
    coming: int

    @classmethod
    def of(cls, group: GroupReceipt) -> GroupReport:
        removed = [
            RemovedReport(tier=r.tier.value, reason=r.reason, chunks=r.chunks, last_at=r.last_at)
            for r in group.removed
        ]
        fields = {name: getattr(group, name) for name in cls.model_fields if name != "removed"}
        return cls(**fields, removed=removed)


class LineReport(BaseModel):
    """A lower tier as it was at the decision; no speed if it had not been measured."""

    tier: str
    begin_s: float
    bytes_per_s: float | None
    queued_bytes: int
    stuck_s: float
    usable_bytes: int  # what loading everything would bring up from it
    chosen_bytes: int

    @classmethod
    def of(cls, line: Line, usable_bytes: int, chosen_bytes: int) -> LineReport:
        return cls(
            tier=line.tier.value,
            begin_s=line.begin_s,
            bytes_per_s=1 / line.byte_s if line.byte_s else None,
            queued_bytes=line.queued_bytes,
            stuck_s=line.stuck_s,
            usable_bytes=usable_bytes,
            chosen_bytes=chosen_bytes,
        )


class ChoiceReport(BaseModel):
    tokens: int
    load_s: float
    compute_s: float

    @classmethod
    def of(cls, choice: Choice) -> ChoiceReport:
        return cls(tokens=choice.tokens, load_s=choice.load_s, compute_s=choice.compute_s)


class VerdictReport(BaseModel):
    """How much to load, and the estimates it was decided with; none if nothing was measured."""

    why: str
    usable_tokens: int
    tokens: int
    compute_all_s: float | None
    chosen: ChoiceReport | None
    everything: ChoiceReport | None
    tiers: list[LineReport]

    @classmethod
    def of(cls, verdict: Verdict) -> VerdictReport:
        chosen, everything = verdict.chosen, verdict.everything
        is_measured = chosen is not None and everything is not None
        return cls(
            why=verdict.why,
            usable_tokens=verdict.usable_tokens,
            tokens=verdict.tokens,
            compute_all_s=verdict.compute_all_s if is_measured else None,
            chosen=None if chosen is None else ChoiceReport.of(chosen),
            everything=None if everything is None else ChoiceReport.of(everything),
            tiers=[
                LineReport.of(line, *sizes)
                for line, *sizes in zip(
                    verdict.lines, everything.tier_bytes, chosen.tier_bytes, strict=True
                )
            ]
            if chosen is not None and everything is not None
            else [],
        )


class OutcomeReport(BaseModel):
    """What the engine did; see `kvbm.protocol.Outcome`."""

    state: State
    local_tokens: int
    loaded_tokens: int
    waited_s: float
    load_s: float
    late: Late

    @classmethod
    def of(cls, outcome: Outcome) -> OutcomeReport:
        return cls(**{name: getattr(outcome, name) for name in cls.model_fields})


class ReceiptReport(BaseModel):
    """One lookup. Times are seconds since 1970, durations seconds from `asked_at`."""

    request: str
    engine: str
    asked_at: float
    answered_s: float
    refused: str
    groups: list[GroupReport]
    verdict: VerdictReport
    landed: dict[str, int]
    failed: int
    crowded: int
    late: int
    last_arrival_s: float | None
    closed_s: float | None
    outcome: OutcomeReport | None

    @classmethod
    def of(cls, receipt: Receipt) -> ReceiptReport:
        outcome = receipt.outcome
        copied = {"groups", "verdict", "outcome"}
        fields = {name: getattr(receipt, name) for name in cls.model_fields.keys() - copied}
        return cls(
            **fields,
            groups=[GroupReport.of(group) for group in receipt.groups],
            verdict=VerdictReport.of(receipt.verdict),
            outcome=None if outcome is None else OutcomeReport.of(outcome),
        )


class Receipts(BaseModel):
    """Newest first."""

    kept: int
    kept_bytes: int
    receipts: list[ReceiptReport]
