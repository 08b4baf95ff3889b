"""Do no harm: load only as much of a prefix as is sooner in the engine than computed there.

For every place where the prefix can be cut, the time to load what is before it plus the time to
compute what is behind it; the manager brings up what is before the best one. Loading takes as long
as the slowest tier needs for its part, behind what is queued there already, and the copy into the
engine after it. Rules that `decide` keeps:

- It never predicts more time than computing everything takes.
- A slower engine never makes it load less, nor does a faster tier where there is one lower tier.
- What is not measured costs nothing: without figures everything is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.meter import Meter
from kvbm.onboard import Onboarder
from kvbm.protocol import Pace
from storage_tiers.base import Key, Tier, TierName

Mode = Literal["auto", "always_load"]

SLACK: Final = 0.05
"""What loads may take beyond the best cut, as a part of computing all: they spare the engine."""

PROBE_S: Final = 10.0
PROBE_BYTES: Final = 4 << 20
PROBE_CHUNKS: Final = 16
"""A tier found too slow is measured again this often, with so much, and nobody waits for it."""

FIRST_LOWER: Final = 2
"""Where a chunk is, as a number: 0 nowhere, 1 host memory, the lower tiers in order from 2 on."""

Places = Sequence[npt.NDArray[np.uint8]]
Numbers = npt.NDArray[np.float64]


class Chain(Protocol):
    """One cache group's chunks of a request, in sequence order."""

    @property
    def tokens_per_chunk(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def keys(self) -> Sequence[Key]: ...


@dataclass(frozen=True, slots=True)
class Line:
    """What is known of a lower tier at this moment."""

    tier: TierName
    begin_s: float  # 0, and so the next, if never measured
    byte_s: float
    queued_bytes: int  # before anything asked for now
    stuck_s: float = 0.0  # how long its oldest batch has been on its way

    def seconds(self, sizes: Numbers, is_needed: npt.NDArray[np.bool_]) -> Numbers:
        """Until that many bytes more are in host memory; 0 where nothing of it is needed."""
        wait = self.begin_s + (self.queued_bytes + sizes) * self.byte_s
        # A batch that has taken this long will take as long again, for all that is known.
        return np.where(is_needed, np.maximum(wait, self.stuck_s), 0.0)


@dataclass(frozen=True, slots=True)
class Part:
    """A chain with what was found of it, chunk by chunk: arrays of equal length."""

    tokens_per_chunk: int
    window: int  # chunks before a cut that must be there; 0: all
    chunk_bytes: int
    places: npt.NDArray[np.uint8]
    coming: npt.NDArray[np.bool_] | None = None  # queued already, for somebody else


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to get the usable prefix into the engine."""

    tokens: int  # loaded; the rest is computed
    load_s: float
    compute_s: float
    tier_bytes: tuple[int, ...]  # brought up from each lower tier

    @property
    def total_s(self) -> float:
        return self.load_s + self.compute_s


@dataclass(frozen=True, slots=True)
class Verdict:
    """How much to load, and the figures it was decided with; no figures, no choice."""

    usable_tokens: int
    tokens: int
    why: Literal["measured", "unmeasured", "always_load", "nothing"]
    chosen: Choice | None = None
    everything: Choice | None = None  # had all that is usable been loaded
    compute_all_s: float = 0.0
    lines: tuple[Line, ...] = ()

    @property
    def skipped_tokens(self) -> int:
        return self.usable_tokens - self.tokens


NOTHING: Final = Verdict(0, 0, "nothing")


class Governor:
    """Decides for the block manager; called from its event loop."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        onboarder: Onboarder,
        meter: Meter,
        mode: Mode = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode: Mode = mode
        self._tiers = tiers
        self._onboarder = onboarder
        self._meter = meter
        self._clock = clock
        self._probed_at = [clock()] * len(tiers)

    def lines(self) -> list[Line]:
        """The lower tiers at this moment."""
        onboarder = self._onboarder
        found: list[Line] = []
        for tier, pace, queued in zip(
            self._tiers, onboarder.paces, onboarder.queued_bytes, strict=True
        ):
            begin_s, byte_s = pace.costs or (0.0, 0.0)
            found.append(Line(tier.name, begin_s, byte_s, queued, pace.stuck_s))
        return found

    def judge(
        self, chains: Sequence[Chain], places: Places, usable_tokens: int, pace: Pace
    ) -> Verdict:
        """How much of the usable prefix to load."""
        if not usable_tokens:
            verdict = NOTHING
        elif self.mode == "always_load":
            verdict = Verdict(usable_tokens, usable_tokens, "always_load")
        elif not pace.is_measured:
            verdict = Verdict(usable_tokens, usable_tokens, "unmeasured")
        else:
            lines = self.lines()
            is_queued = any(line.queued_bytes for line in lines)
            parts = [
                Part(
                    chain.tokens_per_chunk,
                    chain.window,
                    chain.chunk_bytes,
                    found,
                    self._on_their_way(chain.keys) if is_queued else None,
                )
                for chain, found in zip(chains, places, strict=True)
            ]
            verdict = decide(parts, usable_tokens, lines, pace)
        self._meter.judged(verdict.why, verdict.skipped_tokens)
        return verdict

    def probe(self, chains: Sequence[Chain], places: Places, verdict: Verdict) -> None:
        """Measure tiers that were passed over and not measured for a while.

        A little of what was skipped is brought up, and nobody waits for it.
        """
        now = self._clock()
        queued = self._onboarder.queued_bytes
        for index, tier in enumerate(self._tiers):
            idle_s = min(self._onboarder.paces[index].idle_s, now - self._probed_at[index])
            if idle_s < PROBE_S or queued[index]:
                continue
            keys: list[Key] = []
            for chain, found in zip(chains, places, strict=True):
                start = -(-verdict.tokens // chain.tokens_per_chunk)
                end = -(-verdict.usable_tokens // chain.tokens_per_chunk)
                here = np.flatnonzero(found[start:end] == index + FIRST_LOWER)
                keys += [chain.keys[start + at] for at in here[:PROBE_CHUNKS].tolist()]
            left_bytes = PROBE_BYTES
            for chunk in tier.find(keys):
                if left_bytes > 0 and chunk is not None:
                    self._onboarder.request(chunk, index)
                    left_bytes -= chunk.length
            if keys:
                self._probed_at[index] = now
                self._meter.probed(tier.name)

    def _on_their_way(self, keys: Sequence[Key]) -> npt.NDArray[np.bool_]:
        return np.fromiter((key in self._onboarder for key in keys), np.bool_, len(keys))


def decide(parts: Sequence[Part], usable_tokens: int, lines: Sequence[Line], pace: Pace) -> Verdict:
    """The cut with the least predicted time. Cost: a few array operations per group and tier."""
    cuts = _cuts(parts, usable_tokens)
    chunks = [np.zeros(len(cuts), dtype=np.int64) for _ in lines]
    amounts = [np.zeros(len(cuts)) for _ in lines]
    copied = np.zeros(len(cuts))
    for part in parts:
        ends = -(-cuts // part.tokens_per_chunk)
        starts = np.maximum(ends - part.window - 1, 0) if part.window else np.zeros_like(ends)
        copied += _between(part.places > 0, starts, ends) * part.chunk_bytes
        for number in range(len(lines)):
            lies_there = part.places == number + FIRST_LOWER
            chunks[number] += _between(lies_there, starts, ends)
            if part.coming is not None:
                lies_there &= ~part.coming
            amounts[number] += _between(lies_there, starts, ends) * part.chunk_bytes
    load_s = pace.copy_s * (copied > 0) + copied * pace.copy_byte_s
    if lines:
        needs = zip(lines, amounts, chunks, strict=True)
        load_s += np.max([line.seconds(size, count > 0) for line, size, count in needs], axis=0)
    left_s = pace.token_s * (usable_tokens - cuts)
    left_s += pace.pair_s * (usable_tokens**2 - cuts.astype(np.float64) ** 2) / 2
    total_s = load_s + left_s
    all_s = float(total_s[0])
    good = np.flatnonzero(total_s <= min(all_s, float(total_s.min()) + SLACK * all_s))

    def choice(index: int) -> Choice:
        sizes = tuple(int(amount[index]) for amount in amounts)
        return Choice(int(cuts[index]), float(load_s[index]), float(left_s[index]), sizes)

    chosen = choice(int(good[-1]))
    return Verdict(
        usable_tokens, chosen.tokens, "measured", chosen, choice(-1), all_s, tuple(lines)
    )


def _cuts(parts: Sequence[Part], usable_tokens: int) -> npt.NDArray[np.int64]:
    """Where the prefix may end: at 0, at its full length, and at any chunk's end between.

    Between, only where every group that needs a window has it, because the engine would look for
    an earlier end otherwise.
    """
    step = max(part.tokens_per_chunk for part in parts)
    cuts = np.arange(0, usable_tokens, step, dtype=np.int64)
    fits = np.ones(len(cuts), dtype=np.bool_)
    for part in parts:
        fits &= cuts % part.tokens_per_chunk == 0
        if part.window:
            ends = np.minimum(cuts // part.tokens_per_chunk, len(part.places))
            starts = np.maximum(ends - part.window, 0)
            fits &= _between(part.places > 0, starts, ends) == ends - starts
    return np.append(cuts[fits], usable_tokens)


def _between(
    marks: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """How many marks lie in each range."""
    sums = np.concatenate(([0], np.cumsum(marks)))
    last = len(marks)
    counted: npt.NDArray[np.int64] = sums[np.minimum(ends, last)] - sums[np.minimum(starts, last)]
    return counted
