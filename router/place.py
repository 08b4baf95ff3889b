"""The place in one node's stream: what is new, what was seen, what is missing. No input or output.

A node's events are numbered from 0 within one run of its daemon, its publisher. What `hear` and the
others return is to be applied at once, in that order; each event comes out once, and only when all
before it did or are part of a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence


class Place:
    """`next` is the first sequence not applied yet; None until a snapshot has come."""

    def __init__(self, ahead_bytes_max: int) -> None:
        self.publisher = 0  # 0: none is known
        self.next: int | None = None
        self.is_held = False
        self.duplicates_total = 0
        self.gaps_total = 0
        self.dropped_total = 0  # kept for later, and then no room for it
        self._ahead: dict[int, bytes] = {}
        self._ahead_bytes = 0
        self._ahead_bytes_max = ahead_bytes_max

    @property
    def has_gap(self) -> bool:
        """Later events have come, and the next has not."""
        return self.next is not None and not self.is_held and bool(self._ahead)

    @property
    def behind(self) -> int:
        """Events that are known to have happened and are not applied."""
        return max(self._ahead) + 1 - (self.next or 0) if self._ahead else 0

    def meet(self, publisher: int) -> None:
        """The node's daemon is another run from now on: nothing of its stream is known."""
        self.publisher, self.next, self.is_held = publisher, None, False
        self._forget_ahead()

    def hold(self) -> None:
        """Apply nothing until `release` or `resume`: a snapshot is on its way."""
        self.is_held = True

    def release(self) -> Sequence[bytes]:
        """No snapshot came after all."""
        self.is_held = False
        return self._follow_up()

    def resume(self, following: int) -> Sequence[bytes]:
        """A snapshot was applied that includes all events before `following`."""
        self.next, self.is_held = following, False
        for sequence in [known for known in self._ahead if known < following]:
            self._take(sequence)
        return self._follow_up()

    def hear(self, sequence: int, payload: bytes) -> Sequence[bytes]:
        """One event of `publisher`, live or replayed."""
        if sequence == self.next and not self.is_held:
            self.next += 1
            if not self._ahead:
                return (payload,)
            if sequence in self._ahead:
                self._take(sequence)
            return [payload, *self._follow_up()]
        if sequence in self._ahead or (self.next is not None and sequence < self.next):
            self.duplicates_total += 1
            return ()
        if self.next is not None and not self.is_held and not self._ahead:
            self.gaps_total += 1
        self._ahead[sequence] = payload
        self._ahead_bytes += len(payload)
        while self._ahead_bytes > self._ahead_bytes_max:
            self._take(next(iter(self._ahead)))
            self.dropped_total += 1
        return ()

    def check_integrity(self) -> None:
        assert self._ahead_bytes == sum(len(payload) for payload in self._ahead.values())
        assert self._ahead_bytes <= self._ahead_bytes_max
        if self.next is not None:
            assert all(sequence >= self.next for sequence in self._ahead)
            assert self.is_held or self.next not in self._ahead

    def _follow_up(self) -> list[bytes]:
        ready: list[bytes] = []
        while self.next is not None and self.next in self._ahead:
            ready.append(self._take(self.next))
            self.next += 1
        return ready

    def _take(self, sequence: int) -> bytes:
        payload = self._ahead.pop(sequence)
        self._ahead_bytes -= len(payload)
        return payload

    def _forget_ahead(self) -> None:
        self._ahead.clear()
        self._ahead_bytes = 0
