"""From the block index's answer to the table of workers: the same numbers in the table's rows."""

from __future__ import annotations

import numpy as np

from router.cost import Covered
from router.index import Matches, WorkerId
from router.workers import Workers


class Covering:
    """One thread calls it. Costs a few microseconds while no worker comes or goes."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._columns: tuple[WorkerId | None, ...] = ()
        self._generation = -1
        self._column_of = np.zeros(0, dtype=np.intp)  # by row; the last column is an empty one

    def of(self, matches: Matches) -> Covered:
        """See `router.cost.Request.covered`; workers the index does not know find nothing."""
        if matches.workers is not self._columns or self._generation != self._workers.generation:
            self._columns, self._generation = matches.workers, self._workers.generation
            self._column_of = np.full(self._workers.rows, len(matches.workers), dtype=np.intp)
            for column, worker in enumerate(matches.workers):
                if worker is not None and worker in self._workers:
                    self._column_of[self._workers.row(worker)] = column
        tiers, columns = matches.reach.shape
        padded = np.zeros((tiers, columns + 1), dtype=np.int64)
        padded[:, :columns] = matches.reach
        covered: Covered = padded[:, self._column_of]
        return covered
