"""Run as a program by test_socket: an engine that holds chunks and slots until it is killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kvbm.protocol import HERE, MatchGroup
from kvbm.stand_in import StandIn
from tests.kvbm.builders import CHUNK_BYTES, chunks_of, keys_of

ITEMS = chunks_of("child", 4)


def hold(socket: Path) -> None:
    with StandIn(socket, CHUNK_BYTES) as engine:
        engine.store(ITEMS)
        keys = keys_of(ITEMS)
        lookup = engine.client.look_up([MatchGroup(16, 0, b"".join(keys))], keys)
        assert lookup is not None
        engine.wait(lambda: list(lookup.states) == [HERE] * len(keys), "all chunks are held")
        sys.stdout.write("holding\n")
        sys.stdout.flush()
        time.sleep(300)


if __name__ == "__main__":
    hold(Path(sys.argv[1]))
