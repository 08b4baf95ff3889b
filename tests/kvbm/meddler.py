"""Run as a program by test_handover: does something to what a daemon left, then becomes the next.

    python -m tests.kvbm.meddler FILE COMMAND...

`FILE` holds what to do: `flip KEY...` (hexadecimal: the first byte of each chunk), `garble` or
`cut` (the snapshot); nothing if it is not there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def meddle(action: str, keys: list[str], fds: dict[str, int]) -> None:
    # Most starts have nothing to do here.
    from kvbm.daemon.handover import ARENA, INDEX
    from kvbm.daemon.snapshot import read_snapshot
    from storage_tiers.arena import Arena

    index = fds[INDEX]
    size = os.fstat(index).st_size
    if action == "cut":
        os.ftruncate(index, size - 1)
    elif action == "garble":
        (byte,) = os.pread(index, 1, size // 2)
        os.pwrite(index, bytes([byte ^ 1]), size // 2)
    elif action == "flip":
        arena = Arena.attach(os.dup(fds[ARENA]))
        places = {chunk.key.hex(): slot for chunk, slot in read_snapshot(index).chunks}
        for key in keys:
            arena.view(places[key].offset, 1)[0] ^= 1
        arena.close()
    else:
        raise ValueError(action)


if __name__ == "__main__":
    file, *command = sys.argv[1:]
    if Path(file).exists() and os.environ.get("LISTEN_FDS"):
        what, *arguments = Path(file).read_text().split()
        names = os.environ["LISTEN_FDNAMES"].split(":")
        meddle(what, arguments, {name: 3 + place for place, name in enumerate(names)})
    os.execv(command[0], command)
