"""What routers that missed some, or are new, are given: the endpoint `kv-events`.

Why a snapshot is exact though events go on while it is taken. It is as of `next`, the number of
the first event after its beginning, and whoever asked applies it first, then every event from
`next` on, which is on the stream it listens to already, or in the ring. Changes are entered and
told in one step, and the snapshot is read between such steps; a row stays in its place for as long
as it is held. So a block that no event from `next` on names was read exactly once, as it was all
the while. Of one that some event names, the last of them says what is the case, whatever was read:
stored, removed and cleared say what is, not how it differs from before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain
from typing import Final

from kvbm.announce.engines import EngineFollowers
from kvbm.announce.stream import Stream
from kvbm.announce.tiers import TierAnnouncer
from runtime.events.node_stream import Begins, Rows, decode_question, encode_catch_up
from runtime.requests import RequestContext

BLOCKS_AT_ONCE: Final = 1 << 15


class CatchUpHandler:
    def __init__(self, stream: Stream, tiers: TierAnnouncer, engines: EngineFollowers) -> None:
        self._stream = stream
        self._tiers = tiers
        self._engines = engines
        self.replays_total = 0
        self.snapshots_total = 0

    async def answer(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        """Raises WireError on what is no question."""
        question = decode_question(payload)
        stream = self._stream
        missing = None
        if question.publisher == stream.publisher:
            missing = stream.replay(question.first)
        if missing is not None:
            self.replays_total += 1
            yield encode_catch_up(Begins(stream.publisher, "replay", stream.next))
            for envelope in missing:
                yield envelope
            return
        self.snapshots_total += 1
        parts: list[Callable[[int], Iterator[list[Rows]]]] = [self._tiers.rows]
        parts += [follower.rows for follower in self._engines.all]
        yield encode_catch_up(Begins(stream.publisher, "snapshot", stream.next))
        for step in chain.from_iterable(part(BLOCKS_AT_ONCE) for part in parts):
            for rows in step:
                yield encode_catch_up(rows)
            await asyncio.sleep(0)
