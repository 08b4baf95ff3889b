"""Headers of a request and its answer that the frontend itself cares for."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Final

REQUEST_ID: Final = b"x-request-id"
TRACEPARENT: Final = b"traceparent"
SESSION: Final = b"x-session-id"
INSTANCE: Final = b"x-worker-instance-id"
TTFT_TARGET: Final = b"x-ttft-target-ms"
ITL_TARGET: Final = b"x-itl-target-ms"

# Of one connection, not of the message (RFC 9110, section 7.6.1), or made anew on the way.
_OWN_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"host",
        b"content-length",
        b"expect",
        b"accept-encoding",
        b"authorization",
        b"x-api-key",
        REQUEST_ID,
        TRACEPARENT,
    }
)
_ID = re.compile(rb"[!-~]{1,128}")
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

# Ids tell requests apart and protect nothing: no system call for each.
_random_bits: Final = random.Random().getrandbits

Headers = Iterable[tuple[bytes, bytes]]


def first(headers: Headers, name: bytes) -> bytes | None:
    """`name` in lower case, as the server gives all of them."""
    for given, value in headers:  # looked for several times in each request: no generator
        if given == name:
            return value
    return None


def request_id(headers: Headers) -> str:
    """The client's, if it can be one, else a new one."""
    given = first(headers, REQUEST_ID)
    if given is not None and _ID.fullmatch(given):
        return given.decode()
    return f"{_random_bits(128):032x}"


def traceparent(headers: Headers) -> str:
    """W3C trace context: the client's trace with a step of our own, else a new trace."""
    given = first(headers, TRACEPARENT)
    if given is not None and _TRACE.fullmatch(given) and given[:2] != b"ff":
        version, trace, _, flags = given.decode().split("-")
        return f"{version}-{trace}-{_random_bits(64):016x}-{flags}"
    return f"00-{_random_bits(128):032x}-{_random_bits(64):016x}-00"


def onward(headers: Headers) -> list[tuple[str, str]]:
    """Those that the engine gets as they came."""
    return [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name not in _OWN_HOP
    ]
