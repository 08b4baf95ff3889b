"""Frames of a request session: a length (4 bytes, little-endian), then msgpack.

Both sides open with `Hello`. The client opens streams with rising numbers; the server answers each
with items and one end. A stream's items cost their length and `ITEM_COST_BYTES`; the server sends
while the stream has credit left, so at most one item goes beyond it, and the client grants anew
what its reader has taken. What breaks these rules is a `FrameError`, which ends the connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from runtime.requests.errors import MESSAGE_CHARACTERS_MAX, Outcome

VERSION: Final = 1
LENGTH_BYTES: Final = 4
ITEM_COST_BYTES: Final = 64  # so that many empty items are bounded too
HEADERS_MAX: Final = 64

StreamNumber = Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)]
Credit = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Text = Annotated[str, msgspec.Meta(max_length=MESSAGE_CHARACTERS_MAX)]
Headers = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=128)], Text], msgspec.Meta(max_length=HEADERS_MAX)
]


class FrameError(Exception):
    """The other side broke the rules."""


class Hello(msgspec.Struct, tag=0, array_like=True, frozen=True):
    version: int
    frame_bytes_max: Annotated[int, msgspec.Meta(ge=1)]  # the largest that the sender takes
    name: Text


class Open(msgspec.Struct, tag=1, array_like=True, frozen=True):
    stream: StreamNumber
    endpoint: Annotated[str, msgspec.Meta(max_length=512)]
    payload: bytes
    headers: Headers
    timeout_s: Annotated[float, msgspec.Meta(ge=0)]
    credit_bytes: Credit


class Grant(msgspec.Struct, tag=2, array_like=True, frozen=True, gc=False):
    stream: StreamNumber
    size_bytes: Credit


class Stop(msgspec.Struct, tag=3, array_like=True, frozen=True, gc=False):
    """Come to an end: no more than what makes the answer complete."""

    stream: StreamNumber


class Cancel(msgspec.Struct, tag=4, array_like=True, frozen=True, gc=False):
    """Nobody reads this stream any more."""

    stream: StreamNumber


class Item(msgspec.Struct, tag=5, array_like=True, frozen=True, gc=False):
    stream: StreamNumber
    payload: bytes


class End(msgspec.Struct, tag=6, array_like=True, frozen=True, gc=False):
    stream: StreamNumber
    outcome: Outcome
    message: Text


class Ping(msgspec.Struct, tag=7, array_like=True, frozen=True, gc=False):
    pass


class Pong(msgspec.Struct, tag=8, array_like=True, frozen=True, gc=False):
    pass


class Bye(msgspec.Struct, tag=9, array_like=True, frozen=True, gc=False):
    """The sender closes the connection, and why."""

    reason: Text


Frame = Hello | Open | Grant | Stop | Cancel | Item | End | Ping | Pong | Bye

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytearray:
    """The frame with its length before it; about 0.5 µs and one copy of the payload."""
    buffer = bytearray(LENGTH_BYTES)
    _encoder.encode_into(frame, buffer, LENGTH_BYTES)
    buffer[:LENGTH_BYTES] = (len(buffer) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return buffer


class FrameReader:
    """Frames out of bytes in pieces of any size; holds at most one frame and one piece."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """All frames that are whole now; raises FrameError, after which it is of no more use."""
        buffer = self._buffer
        buffer += data
        at, end = 0, len(buffer)
        try:
            with memoryview(buffer) as view:
                while end - at >= LENGTH_BYTES:
                    length = int.from_bytes(view[at : at + LENGTH_BYTES], "little")
                    if not 0 < length <= self._frame_bytes_max:
                        raise FrameError(
                            f"a frame of {length} bytes; from 1 to {self._frame_bytes_max} may be"
                        )
                    body = at + LENGTH_BYTES
                    if end - body < length:
                        break
                    at = body + length
                    yield _decode(view[body:at])
        finally:
            del buffer[:at]


def _decode(body: memoryview) -> Frame:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:  # ValidationError is a DecodeError
        raise FrameError(f"a frame that is none: {error}") from error
    finally:
        body.release()
