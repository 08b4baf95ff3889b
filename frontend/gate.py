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

    def __init__(
        self,
        api_keys: Collection[str],
        requests_max: int,
        body_bytes_max: int,
        *,
        admin_keys: Collection[str] = (),
        clients_are_admins: bool = False,
    ) -> None:
        # Digests: what the time of a look-up tells of them, it does not tell of keys.
        self._admins = frozenset(_digest(key.encode()) for key in admin_keys)
        clients = frozenset(_digest(key.encode()) for key in api_keys)
        self._keys = clients | self._admins if clients else clients
        self._clients_are_admins = clients_are_admins
        self._requests_max = requests_max
        self._body_bytes_max = body_bytes_max
        self.requests = 0
        self.refused_total = 0

    def check_key(self, headers: Headers) -> None:
        """Raises ApiError (401)."""
        if self._keys and _digest(_key(headers)) not in self._keys:
            raise _wrong_key(headers)

    def check_admin(self, headers: Headers) -> None:
        """Who may change what the frontend does. Raises ApiError (401 or 403)."""
        if self._admins and _digest(_key(headers)) in self._admins:
            return
        self.check_key(headers)
        if not self._clients_are_admins:
            said = "This takes one of openai.admin_keys, unless openai.admin is `clients`"
            raise ApiError(403, said, "admin_only")

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


def _key(headers: Headers) -> bytes:
    given = first(headers, b"authorization") or b""
    scheme, _, key = given.partition(b" ")
    if scheme.lower() != b"bearer":
        key = first(headers, b"x-api-key") or b""
    return key.strip()


def _wrong_key(headers: Headers) -> ApiError:
    said = "No API key was given: send it as a bearer token"
    if _key(headers):
        said = "Incorrect API key"
    return ApiError(401, said, "invalid_api_key", extra=((b"www-authenticate", b"Bearer"),))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
