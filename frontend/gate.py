"""What every request passes before it is read: keys, room, and a bound on its size."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from frontend.errors import ApiError, overloaded
from frontend.headers import Headers, first

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class ClientGone(Exception):
    """The client closed its connection before it had sent all."""


class Gate:
    """`api_keys`: none means that everybody may ask."""

    def __init__(self, api_keys: Collection[str], requests_max: int, body_bytes_max: int) -> None:
        # Digests: what the time of a look-up tells of them, it does not tell of keys.
        self._keys = frozenset(_digest(key.encode()) for key in api_keys)
        self._requests_max = requests_max
        self._body_bytes_max = body_bytes_max
        self.requests = 0
        self.refused_total = 0

    def check_key(self, headers: Headers) -> None:
        """Raises ApiError (401)."""
        if not self._keys:
            return
        given = first(headers, b"authorization") or b""
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            key = first(headers, b"x-api-key") or b""
        if _digest(key.strip()) not in self._keys:
            said = "Incorrect API key" if key else "No API key was given: send it as a bearer token"
            raise ApiError(401, said, "invalid_api_key")

    def enter(self) -> None:
        """Count a request in; `leave` afterwards. Raises ApiError (503) if there are too many."""
        if self.requests >= self._requests_max:
            self.refused_total += 1
            raise overloaded(f"{self._requests_max} requests are under way already", 1)
        self.requests += 1

    def leave(self) -> None:
        self.requests -= 1

    async def body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it. Raises ApiError (413), or ClientGone."""
        length = first(headers, b"content-length")
        if length is not None and length.isdigit() and int(length) > self._body_bytes_max:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self._body_bytes_max:
                raise self._too_large()
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self._body_bytes_max} bytes", "body_too_large"
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
