"""Block events gathered, to be applied to an index by one call.

A call from Python costs more than storing a block: a reader of events gathers what has come and
calls `Index.apply` once. Gathering costs well under a microsecond an event; the arrays are
referred to, not copied, until they are applied.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

from router.index import Hashes, Tier, WorkerId

Workers = tuple[WorkerId, ...]

_WORD = (1 << 64) - 1
_STORED, _REMOVED, _CLEARED, _BROKEN = range(4)  # as `index_apply` has them
_NONE = np.zeros(0, dtype=np.uint64)


class Changes:
    """In the order in which they are to be applied.

    Every event is for one worker or several, each once; for several it is as if each had sent it,
    one behind the other, but costs little more than for one where all its names are sequence
    hashes. The arguments are those of `Index.stored`, `removed` and `cleared`.
    """

    def __init__(self) -> None:
        self._heads: list[tuple[int, int, int, int, int, int]] = []
        self._names: list[Hashes] = []
        self._tokens: list[Hashes] = []
        self._groups: dict[Workers, int] = {}
        self._storing: set[int] = set()

    def __len__(self) -> int:
        """Events."""
        return len(self._heads)

    def stored(
        self, workers: Workers, tier: Tier, parent: int | None, names: Hashes, tokens: Hashes
    ) -> None:
        group = self._groups.setdefault(workers, len(self._groups))
        count = len(names)
        if count != len(tokens):
            self._heads.append((_BROKEN, group, 0, 0, 0, 0))
            return
        self._storing.add(group)
        if parent is None:
            self._heads.append((_STORED, group, tier, count, 0, 0))
        else:
            self._heads.append((_STORED, group, tier, count, 1, parent & _WORD))
        self._names.append(names)
        self._tokens.append(tokens)

    def removed(self, workers: Workers, tier: Tier, names: Hashes) -> None:
        group = self._groups.setdefault(workers, len(self._groups))
        self._heads.append((_REMOVED, group, tier, len(names), 0, 0))
        self._names.append(names)

    def cleared(self, workers: Workers) -> None:
        group = self._groups.setdefault(workers, len(self._groups))
        self._heads.append((_CLEARED, group, 0, 0, 0, 0))

    def forget(self) -> None:
        """All of them, to gather others."""
        self._heads, self._names, self._tokens = [], [], []
        self._groups, self._storing = {}, set()

    @property
    def groups(self) -> list[tuple[Workers, bool]]:
        """Workers that have events together, and whether any of these stores blocks."""
        return [(workers, n in self._storing) for workers, n in self._groups.items()]

    def workers_of(self, event: int) -> Workers:
        return list(self._groups)[self._heads[event][1]]

    def columns(self) -> tuple[NDArray[np.uint64], Hashes, Hashes]:
        """What kernels take: words of all events (`index_apply`), all names, all tokens' hashes.

        Raises TypeError if an array is not of uint64.
        """
        heads = np.fromiter(chain.from_iterable(self._heads), np.uint64, 6 * len(self._heads))
        return heads, _joined(self._names), _joined(self._tokens)


def _joined(arrays: list[Hashes]) -> Hashes:
    return np.concatenate([_NONE, *arrays], dtype=np.uint64, casting="no")
