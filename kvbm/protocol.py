"""Messages on the daemon's control socket, and their frames.

A frame is a 4-byte little-endian length and one msgpack array whose first element names the
message. An engine opens one connection per role: its scheduler (`role="scheduler"`) and each of
its workers (`role="worker"`). Keys travel concatenated, slots as packed records, because one
request may carry thousands of either.

Order: Hello -> Welcome (a worker's comes with the arena's file descriptor) or Refused; then, when
all members of the engine are there, Ready and Share to the scheduler. A connection that breaks an
order or a bound is closed. `VERSION` changes with any change here; daemon and client must agree.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from typing import Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from storage_tiers.arena import Slot
from storage_tiers.base import KEY_BYTES, Key, TierName

VERSION: Final = 4
FRAME_BYTES_MAX: Final = 16 << 20
KEYS_PER_MATCH_MAX: Final = 1 << 17
POSITIONS_MAX: Final = 1 << 31
GROUPS_MAX: Final = 64
RANKS_MAX: Final = 1024
WORKER_ID_MAX: Final = (1 << 64) - 1
DP_RANKS_MAX: Final = 1 << 16
BLOCK_TOKENS_MAX: Final = 1 << 20
NAMESPACE_BYTES_MAX: Final = 64
ENDPOINT_CHARS_MAX: Final = 512
REQUEST_CHARS_MAX: Final = 256

# Of an `Outcome`.
State = Literal["computed", "loaded", "failed", "ended"]
Late = Literal["", "answer", "onboard"]

# States of one key in `Matched`.
MISS: Final = 0  # nowhere, or of no use because something before it is missing
HERE: Final = 1  # in host memory and claimed for the ticket
COMING: Final = 2  # being brought up; `Arrived` will tell
PRESENT: Final = 3  # kept somewhere, but not usable: there is no need to store it again

# Of a slot's record: where its chunk was found.
SOURCES: Final = {TierName.DRAM: 2, TierName.SSD: 3, TierName.S3: 4, TierName.PEER: 5}

SLOT_RECORD: Final = np.dtype(
    [
        ("index", "<u4"),
        ("source", "u1"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("generation", "<u8"),
    ]
)
_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages."""


# -- client to daemon ---------------------------------------------------------------------


class Routing(msgspec.Struct, frozen=True, array_like=True):
    """What routers are told of an engine, and where its own KV events are heard."""

    worker_id: int  # its instance in discovery, 1 to 2^64 - 1
    dp_rank: int
    namespace: bytes  # that its keys are made with
    block_tokens: int  # in one of its own blocks: what notes and events count in
    group: int  # the cache group whose chunks carry notes, as its own events number it
    events: str = ""  # of its ZMQ publisher, for this rank; none: it has none
    replay: str = ""
    topic: str = ""


class Hello(Message, frozen=True):
    version: int
    role: str  # "scheduler" or "worker"
    engine: str  # unique per engine process and data-parallel rank
    rank: int
    world_size: int
    fingerprint: dict[str, str]  # for people; the keys are made with it already
    group_bytes: list[int]  # worker: its stripe's bytes per chunk, by cache group
    replicated: bool  # every rank holds the same bytes: one stripe serves all
    pid: int
    routing: Routing | None = None  # of a scheduler


class MatchGroup(Message, frozen=True):
    tokens_per_chunk: int
    window: int  # 0: all chunks are needed; else only the last `window` before the hit's end
    keys: bytes


class Pace(msgspec.Struct, frozen=True, array_like=True):
    """An engine's speed, as it measured it; 0 where it has not."""

    token_s: float = 0.0  # seconds to prefill a token,
    pair_s: float = 0.0  # and more for each token before it
    copy_s: float = 0.0  # seconds to load a prefix from host memory,
    copy_byte_s: float = 0.0  # and more for each byte of it

    @property
    def is_measured(self) -> bool:
        return self.token_s > 0 or self.pair_s > 0

    @property
    def is_sound(self) -> bool:
        costs = (self.token_s, self.pair_s, self.copy_s, self.copy_byte_s)
        return all(0 <= cost < math.inf for cost in costs)

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds to compute the tokens from `start` to before `end`; 0 if there are none."""
        if end <= start:
            return 0.0
        return self.token_s * (end - start) + self.pair_s * (end**2 - start**2) / 2


class Match(Message, frozen=True):
    """What of these sequences is kept? Claims what is in host memory, brings up the rest."""

    ticket: int
    groups: list[MatchGroup]
    request: str = ""  # the engine's name for it, for people; at most REQUEST_CHARS_MAX
    pace: Pace = Pace()


class Unmatch(Message, frozen=True):
    tickets: list[int]


class Outcome(Message, frozen=True):
    """What became of a lookup; before its ticket is closed, and only for the receipt."""

    ticket: int
    state: State
    local_tokens: int  # the engine had itself
    loaded_tokens: int  # behind those
    waited_s: float  # from asking to the engine's choice of what to load
    load_s: float  # from there to the end of the load
    late: Late  # what was not waited for any longer


class Lease(Message, frozen=True):
    """Ask for free slots of one length."""

    length: int
    count: int


class Commit(Message, frozen=True):
    """Slots of the lease that now hold chunks: parallel lists, one entry a chunk."""

    keys: bytes
    parents: bytes  # all zeros: none
    positions: list[int]
    slots: bytes
    notes: list[bytes] = []  # see `kvbm.note`; empty, or one entry a chunk, empty if it has none


class GiveBack(Message, frozen=True):
    slots: bytes


class Loaded(Message, frozen=True):
    """The engine has loaded this much, for the counters."""

    bytes: int
    failed: int  # loads that failed and are computed instead


class Fenced(Message, frozen=True):
    """A worker: nothing of mine writes to leased slots any more."""


# -- daemon to client ---------------------------------------------------------------------


class Welcome(Message, frozen=True):
    version: int
    epoch: bytes  # of the arena: 16 bytes, new with each daemon
    session: int  # leases are good within one session only
    salt: bytes = b""  # goes into every key the engine makes
    tag: int = 0  # its tenant's, the last byte of every key


class Refused(Message, frozen=True):
    reason: str


class Ready(Message, frozen=True):
    """Stripe layout of a chunk by cache group: where each rank's bytes begin, and the length."""

    rank_offsets: list[list[int]]
    lengths: list[int]
    always_load: bool = False  # even what would be computed sooner: wait for all that comes


class Share(Message, frozen=True):
    """The engine may keep this much leased; what it has beyond that and does not use goes back."""

    bytes: int


class Matched(Message, frozen=True):
    ticket: int
    states: bytes  # one state a key, groups one after the other
    slots: bytes  # of those HERE
    tokens: int = 0  # of the prefix that is to be loaded


class Arrived(Message, frozen=True):
    ticket: int
    slots: bytes
    failed: list[int]  # indexes that will not come


class Leased(Message, frozen=True):
    slots: bytes
    asked: int  # of `Lease.count`


class Fence(Message, frozen=True):
    """To a worker: stop writing to leased slots, then answer Fenced."""


FromClient = Hello | Match | Unmatch | Outcome | Lease | Commit | GiveBack | Loaded | Fenced
FromDaemon = Welcome | Refused | Ready | Share | Matched | Arrived | Leased | Fence

_encoder = msgspec.msgpack.Encoder()
_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_from_daemon: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)

M = TypeVar("M")


class FrameError(Exception):
    """The peer sent what is no frame of this protocol."""


def decode(decoder: msgspec.msgpack.Decoder[M], body: bytes) -> M:
    """One message of those the decoder knows. Raises FrameError."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"malformed message: {error}") from error


def decode_from_client(body: bytes) -> FromClient:
    """Raises FrameError."""
    return decode(_from_client, body)


def decode_from_daemon(body: bytes) -> FromDaemon:
    """Raises FrameError."""
    return decode(_from_daemon, body)


def encode(message: Message) -> bytes:
    """The message as one frame. Raises FrameError if it is too large to send."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise FrameError(f"{type(message).__name__} of {len(body)} bytes exceeds a frame")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frame bodies, without I/O of its own."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies completed by `data`. Raises FrameError on a length beyond the bound."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._frame_bytes_max:
                raise FrameError(f"a frame of {length} bytes exceeds {self._frame_bytes_max}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body


# -- packed lists -------------------------------------------------------------------------


def split_keys(packed: bytes) -> list[Key]:
    """The keys of a concatenation. Raises FrameError if it is not one."""
    if len(packed) % KEY_BYTES:
        raise FrameError(f"{len(packed)} bytes are no list of {KEY_BYTES}-byte keys")
    return [Key(packed[at : at + KEY_BYTES]) for at in range(0, len(packed), KEY_BYTES)]


def pack_slots(slots: Iterable[tuple[int, int, Slot]]) -> bytes:
    """Records of (index, source tier number, slot)."""
    records = [(i, source, s.offset, s.length, s.generation) for i, source, s in slots]
    return np.array(records, dtype=SLOT_RECORD).tobytes()


SlotRow = tuple[int, int, int, int, int]
"""Of `SLOT_RECORD`: index, source, then what makes a Slot."""


def unpack_slots(packed: bytes) -> list[tuple[int, int, Slot]]:
    """The inverse of `pack_slots`. Raises FrameError on a size that is no whole record count."""
    return [(i, source, Slot(o, n, g)) for i, source, o, n, g in unpack_rows(packed)]


def unpack_rows(packed: bytes) -> list[SlotRow]:
    """The same, without making slots of them yet: half the time."""
    if len(packed) % SLOT_RECORD.itemsize:
        raise FrameError(f"{len(packed)} bytes are no list of slot records")
    records: npt.NDArray[np.void] = np.frombuffer(packed, dtype=SLOT_RECORD)
    rows: list[SlotRow] = records.tolist()
    return rows
