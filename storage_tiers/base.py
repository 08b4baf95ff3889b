"""The one seam between the block manager and the media that keep chunks.

A *chunk* is the unit kept outside an engine: the KV bytes of one or more blocks of one cache
group, all ranks' stripes together. A *tier* maps keys to chunks on one medium. The manager
calls every tier from its event loop; a tier does its I/O off that loop and never blocks it.

Invariants every tier keeps (the conformance suite in `storage_tiers.testing` checks them):
- `load` reports `Loaded` only for bytes whose checksum matched on arrival.
- Bytes that do not match are quarantined by the tier: the key is gone before `load` returns.
- A key that `find` returned may be gone by the time it is loaded; that is `Missing`, no error.
- `store` never exceeds the tier's capacity; it evicts first, and tells the listener.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType, Protocol, runtime_checkable

Key = NewType("Key", bytes)
"""16 bytes: 15 that say what the chunk is (`kvbm.fingerprint.key_of`), then its tenant's tag."""

KEY_BYTES = 16
NOTE_BYTES_MAX = 64 << 10
"""Of what is kept with a chunk besides its bytes; a longer one may be left out by any tier."""


def tenant_of(key: Key) -> int:
    """The tag of the tenant whose chunk it is: 0 to 255, 0 where there are no tenants."""
    return key[KEY_BYTES - 1]


class TierName(StrEnum):
    """G1 engine memory, G2 host memory, G3 SSD, G4 object store; host memory of other nodes."""

    HBM = "G1"
    DRAM = "G2"
    SSD = "G3"
    PEER = "peer"
    S3 = "G4"


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is known of a chunk besides its bytes; travels with it between tiers."""

    key: Key
    length: int  # payload bytes
    checksum: int  # storage_tiers.codec.checksum of the payload
    parent: Key | None  # the chunk before it in its sequence and group
    position: int  # its index in that sequence, 0 for the first
    note: bytes = field(default=b"", compare=False)  # kept beside its bytes, whatever it means


@dataclass(frozen=True, slots=True)
class StoreItem:
    chunk: Chunk
    data: memoryview  # exactly chunk.length bytes, unchanged until `store` returns


@dataclass(frozen=True, slots=True)
class LoadItem:
    key: Key
    into: memoryview  # at least the chunk's length; overwritten whatever the outcome


# -- outcomes of one item ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """The chunk is in the tier, as durable as the tier makes it."""


@dataclass(frozen=True, slots=True)
class Known:
    """The tier had the key already; nothing was written."""


@dataclass(frozen=True, slots=True)
class Full:
    """No room could be made: everything is claimed, or the tenant's quota is used up."""

    reason: str
    cause: str = "full"  # or "quota"


@dataclass(frozen=True, slots=True)
class Loaded:
    """`into` holds the chunk and its checksum matched."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Missing:
    """The tier does not have the key (any more)."""


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Bytes came back that are not the chunk's; the key was quarantined."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The medium refused or could not be reached; the tier's contents are as before."""

    reason: str


StoreOutcome = Stored | Known | Full | Failed
LoadOutcome = Loaded | Missing | Corrupt | Failed


class RemovalReason(StrEnum):
    CAPACITY = "capacity"
    AGE = "age"
    QUOTA = "quota"
    CORRUPT = "corrupt"
    REQUESTED = "requested"


class TierListener(Protocol):
    """Told of residencies a tier gained or lost other than by the caller's own `store` outcome.

    That includes what a tier found when it opened.
    Called on the event loop, between awaits of the tier; must not block or raise.
    """

    def appeared(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes] = ()) -> None:
        """`notes`: of each key, empty where there is none; or none at all."""
        ...

    def noted(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        """Notes of keys that are in the tier, found after it told of them."""
        ...

    def removed(self, tier: TierName, keys: Sequence[Key], reason: RemovalReason) -> None: ...


class SilentListener:
    """A listener for callers that need none."""

    def appeared(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes] = ()) -> None:
        pass

    def noted(self, tier: TierName, keys: Sequence[Key], notes: Sequence[bytes]) -> None:
        pass

    def removed(self, tier: TierName, keys: Sequence[Key], reason: RemovalReason) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What a tier found when it opened."""

    tier: TierName
    chunks: int = 0
    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> chunks
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TierUsage:
    """A snapshot for admin and metrics. Counters run from the tier's opening."""

    tier: TierName
    mover: str  # what moves the bytes: "nixl-posix", "preadv", "boto3", ...
    capacity_bytes: int
    used_bytes: int  # what counts against the capacity, padding included
    chunks: int
    stored_bytes_total: int = 0
    loaded_bytes_total: int = 0
    evictions_total: dict[str, int] = field(default_factory=dict)  # RemovalReason -> chunks
    corrupt_total: int = 0
    errors_total: dict[str, int] = field(default_factory=dict)  # op -> failures
    requests_total: dict[str, int] = field(default_factory=dict)  # op -> paid requests, of S3


class Tier(Protocol):
    """One medium, called from one event loop. `find`, `refusal`, `touch` and `usage` do no I/O."""

    @property
    def name(self) -> TierName: ...

    async def open(self) -> RecoveryReport:
        """Make the tier usable and say what it found. Raises TierError if it cannot be used."""
        ...

    async def close(self) -> None:
        """Finish or abandon what runs, persist what the medium keeps. Idempotent."""
        ...

    def find(self, keys: Sequence[Key]) -> list[Chunk | None]:
        """The chunk of each key that is here, in order, without its note.

        Another node's chunk is known by key and length alone, in S3 until it was loaded once and
        in a peer's memory always: checksum and position are then 0 and the parent None.
        `Loaded.chunk` has everything.
        """
        ...

    async def store(self, items: Sequence[StoreItem]) -> list[StoreOutcome]:
        """Write each item, in order; one outcome per item.

        Cancelling leaves each item stored or not.
        """
        ...

    async def load(self, items: Sequence[LoadItem]) -> list[LoadOutcome]:
        """Read each item into its buffer, verified; one outcome per item.

        `Loaded.chunk` has its note if the tier had it at hand. A cancelled `load` must not write
        to the buffers after it has raised.
        """
        ...

    async def remove(self, keys: Sequence[Key]) -> None:
        """Forget these keys; unknown ones are ignored."""
        ...

    def refusal(self, chunk: Chunk) -> str | None:
        """Why a chunk should not be stored now ("admission", "budget", "quota"), or None.

        Asked each time it is offered, before anything is spent on it; `store` asks no more.
        """
        ...

    def touch(self, keys: Sequence[Key]) -> list[Key]:
        """Mark as used now, later ones more recently: pass a sequence's chunks deepest first.

        Returns those that are not here, in order.
        """
        ...

    def usage(self) -> TierUsage: ...


@dataclass(frozen=True, slots=True)
class SetAside:
    """A place on a medium whose bytes were not the chunk's: out of use until it is given back."""

    key: Key
    at: int  # the medium's own address
    length: int
    since: float  # seconds since 1970


@runtime_checkable
class SupportsScrub(Tier, Protocol):
    """A tier that keeps chunks at places of its own, reads them back, and sets bad ones aside."""

    async def places(self) -> Sequence[int]:
        """Where chunks lie now, in the order in which the medium is read best."""
        ...

    async def scrub(self, place: int) -> tuple[Chunk, LoadOutcome] | None:
        """Read back and verify what lies there, as `load` does; None if nothing does any more."""
        ...

    @property
    def busy(self) -> bool:
        """Whether somebody else's load or store is under way."""
        ...

    def aside(self) -> Sequence[SetAside]:
        """Places out of use, the oldest first. They outlast a restart."""
        ...

    async def give_back(self, keys: Collection[Key]) -> list[SetAside]:
        """Use the places set aside for these keys again; which they were."""
        ...


class TierError(Exception):
    """A tier cannot be opened or used; the message says what was tried, on what, and what to do."""
