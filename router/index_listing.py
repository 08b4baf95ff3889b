"""What one worker holds, block by block: for tests, for doubters, and to give it to another."""

from __future__ import annotations

import numpy as np

from router import index_tables as t
from router.index_memory import U64, IndexMemory


def held(memory: IndexMemory, lane: int, tier: int) -> U64:
    """Sequence hashes, in no order. Costs a pass over all blocks."""
    words = int(memory.state[t.LANE_WORDS])
    rows = memory.rows.reshape(-1, t.LAYERS, words)
    members = (rows[:, tier, lane >> 6] >> np.uint64(lane & 63)) & np.uint64(1) != 0
    members &= memory.set_hashes != 0  # rows of free sets are not cleared
    found: U64 = memory.sequences[members[memory.holders & np.uint32(t.SET_MASK)]]
    return found
