"""What a mock engine tells about its blocks, in the terms of the event plane's wire format.

Times are those of the engine's clock. G1 belongs to `engine`; G2 and G3 belong to `node`, G4 to
everybody: there `engine` only says who caused the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Tier = Literal["G1", "G2", "G3", "G4"]


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """A run of blocks of one sequence is in the tier now; `parent_hash` is the block before it."""

    at_ps: int
    engine: int
    node: int
    tier: Tier
    parent_hash: int | None
    block_hashes: Sequence[int]
    tokens_hashes: Sequence[int]


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """These blocks are not in the tier any more."""

    at_ps: int
    engine: int
    node: int
    tier: Tier
    block_hashes: Sequence[int]


BlockEvent = BlocksStored | BlocksRemoved
Emit = Callable[[BlockEvent], None]
