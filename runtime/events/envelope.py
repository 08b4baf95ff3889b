"""What the reference's event plane wraps a message in: subject, envelope and ZMQ frame.

The envelope is `{topic, publisher_id, sequence, published_at, payload}` in msgpack. Its fields and
their order, and how subjects are built, follow the reference's documents and source. Whether
structs travel as maps or as arrays has changed between its releases, and its decoder takes both:
so does this one, and maps are written. The frame's 5-byte header, one byte of version 1 and the
length as 4 bytes big-endian, is derived from its size: it was not compared with the reference.
"""

from __future__ import annotations

import string
from typing import Annotated, Final

import msgspec
from msgspec import Meta

FRAME_VERSION: Final = 1
FRAME_HEADER_BYTES: Final = 5
PUBLISHER_ID_MAX: Final = (1 << 53) - 1  # exact in a JSON number
U64_MAX: Final = (1 << 64) - 1
_PLAIN: Final = frozenset((string.ascii_letters + string.digits + "-_").encode())

U64 = Annotated[int, Meta(ge=0)]  # msgpack itself ends at 2**64 - 1


class WireError(Exception):
    """Bytes that are not what their place on the wire asks for."""


class Envelope(msgspec.Struct, frozen=True):
    topic: str
    publisher_id: U64
    sequence: U64
    published_at: U64  # milliseconds since 1970
    payload: bytes


class _EnvelopeArray(msgspec.Struct, frozen=True, array_like=True):
    topic: str
    publisher_id: U64
    sequence: U64
    published_at: U64
    payload: bytes


def encode_envelope(envelope: Envelope) -> bytes:
    return _encoder.encode(envelope)


def decode_envelope(data: bytes | memoryview) -> Envelope:
    """Fields that are new to us are skipped. Raises WireError."""
    try:
        if len(data) and is_msgpack_array(data[0]):
            found = _array_decoder.decode(data)
            return Envelope(
                found.topic,
                found.publisher_id,
                found.sequence,
                found.published_at,
                found.payload,
            )
        return _map_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"no envelope: {error}") from error


def encode_frame(payload: bytes) -> bytes:
    return bytes((FRAME_VERSION,)) + len(payload).to_bytes(4, "big") + payload


def decode_frame(data: bytes) -> memoryview:
    """The payload. Raises WireError."""
    if len(data) < FRAME_HEADER_BYTES:
        raise WireError(f"a frame of {len(data)} bytes has no header")
    if data[0] != FRAME_VERSION:
        raise WireError(f"a frame of version {data[0]}; known is {FRAME_VERSION}")
    length = int.from_bytes(data[1:FRAME_HEADER_BYTES], "big")
    if length != len(data) - FRAME_HEADER_BYTES:
        raise WireError(f"a frame says {length} bytes and has {len(data) - FRAME_HEADER_BYTES}")
    return memoryview(data)[FRAME_HEADER_BYTES:]


def event_subject(
    topic: str, namespace: str, component: str | None = None, endpoint: str | None = None
) -> str:
    """`namespace.{ns}[.component.{c}[.endpoint.{e}]].{topic}`, each part percent-encoded."""
    assert component is not None or endpoint is None, "an endpoint is part of a component"
    parts = ["namespace", _encoded(namespace)]
    if component is not None:
        parts += ["component", _encoded(component)]
    if endpoint is not None:
        parts += ["endpoint", _encoded(endpoint)]
    return ".".join([*parts, _encoded(topic)])


def is_msgpack_array(first_byte: int) -> bool:
    return 0x90 <= first_byte <= 0x9F or first_byte in {0xDC, 0xDD}


def _encoded(part: str) -> str:
    """A name's dots and wildcards must not change the subject it stands in."""
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in part.encode())


_encoder = msgspec.msgpack.Encoder()
_map_decoder = msgspec.msgpack.Decoder(Envelope)
_array_decoder = msgspec.msgpack.Decoder(_EnvelopeArray)
