"""OpenAI's error objects: what clients' libraries turn into their exceptions.

Below `/v1/messages` they are Anthropic's, which has OpenAI's in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

INVALID_JSON: Final = "invalid_json"
"""The code of what every wrong way to send a body comes to."""

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_CLIENTS: Final = "invalid_request_error"
_SERVERS: Final = "server_error"
_ANTHROPIC: Final = "/v1/messages"
_NAMED_EVENTS: Final = (_ANTHROPIC, "/v1/responses")
"""Routes whose streams name their events: Anthropic's client passes over one without a name."""
UNSUPPORTED: Final = "unsupported"
"""The code of what only an engine's own server can make."""


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. `code` is a word that programs can rely on."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    extra: tuple[tuple[bytes, bytes], ...] = ()  # headers

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, _CLIENTS if self.status < 500 else _SERVERS)

    def body(self, route: str = "") -> bytes:
        """As the clients of a route expect it."""
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        wrapped = {"type": "error"} if route.startswith(_ANTHROPIC) else {}
        return msgspec.json.encode({**wrapped, "error": told})

    def event(self, route: str = "") -> bytes:
        """As the last event of a stream that had begun."""
        name = b"event: error\n" if route.startswith(_NAMED_EVENTS) else b""
        return b"%bdata: %b\n\n" % (name, self.body(route))

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json"), *self.extra]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(self.retry_after_s).encode()))
        return found


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, code, param)


def model_not_found(model: str, known: list[str]) -> ApiError:
    listed = ", ".join(sorted(known)) or "none at the moment"
    message = f"The model {model!r} does not exist here; served are: {listed}"
    return ApiError(404, message, "model_not_found", "model")


def refused_by_engine(status: int, message: str, param: str | None = None) -> ApiError:
    """What an engine said of a request, where its answer cannot be passed on as it is."""
    return ApiError(status, message, "refused_by_engine", param)


def overloaded(message: str, retry_after_s: int, status: int = 503) -> ApiError:
    return ApiError(status, message, "overloaded", retry_after_s=retry_after_s)


def engine_lost(message: str) -> ApiError:
    """The engine that was at work is gone, and the request could not go on elsewhere."""
    return ApiError(502, message, "engine_lost", retry_after_s=1)
