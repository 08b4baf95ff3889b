"""From the block index's answer to the table of workers: the same numbers in the table's rows."""

from __future__ import annotations

import numpy as np

from router.cost import Covered
from router.index import Matches, Tier, WorkerId
from router.workers import Workers


class Covering:
    """One thread calls it. Costs a microsecond or two while no worker comes or goes."""

    def __init__(self, workers: Workers) -> None:
        from router.cost_kernel import cover

        self._cover = cover
        self._workers = workers
        self._columns: tuple[WorkerId | None, ...] = ()
        self._generation = -1
        self._column_of = np.zeros(0, dtype=np.intp)  # by row; -1: none

    def none(self) -> Covered:
        """See `router.cost.Request.covered`: no worker finds anything."""
        return np.zeros((len(Tier), self._workers.rows), dtype=np.int64)

    def add(self, matches: Matches, covered: Covered) -> None:
        """What is found besides; workers the index does not know find nothing."""
        if matches.workers is not self._columns or self._generation != self._workers.generation:
            self._columns, self._generation = matches.workers, self._workers.generation
            self._column_of = np.full(self._workers.rows, -1, dtype=np.intp)
            for column, worker in enumerate(matches.workers):
                if worker is not None and worker in self._workers:
                    self._column_of[self._workers.row(worker)] = column
        self._cover(matches.reach, self._column_of, covered)
