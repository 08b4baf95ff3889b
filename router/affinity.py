"""Which worker a session belongs to, agreed by all replicas without a word between them.

Rendezvous hashing: each worker draws a number from its own id and the session's, the highest has
the session. A worker that comes or goes moves only the sessions it wins or had. Source: Thaler and
Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from router.index import WorkerId


def owner_of(session: str, workers: Iterable[WorkerId]) -> WorkerId | None:
    """None if there are no workers. Costs about a microsecond a worker."""
    return max(workers, key=lambda worker: (_draw(session, worker), worker), default=None)


def _draw(session: str, worker: WorkerId) -> int:
    name = b"%016x.%d|" % (worker.instance, worker.dp_rank)
    return xxhash.xxh3_64_intdigest(name + session.encode())
