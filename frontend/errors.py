"""OpenAI's error objects: what clients' libraries turn into their exceptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_SERVER: Final = "server_error"
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

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, _SERVER)

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    @property
    def event(self) -> bytes:
        """As the last event of a stream that had begun."""
        return b"data: " + self.body + b"\n\n"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(self.retry_after_s).encode()))
        return found


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, code, param)


def model_not_found(model: str, known: list[str]) -> ApiError:
    listed = ", ".join(sorted(known)) or "none at the moment"
    message = f"The model {model!r} does not exist here; served are: {listed}"
    return ApiError(404, message, "model_not_found", "model")


def overloaded(message: str, retry_after_s: int, status: int = 503) -> ApiError:
    return ApiError(status, message, "overloaded", retry_after_s=retry_after_s)


def engine_lost(message: str) -> ApiError:
    """The engine that was at work is gone, and the request could not go on elsewhere."""
    return ApiError(502, message, "engine_lost", retry_after_s=1)
