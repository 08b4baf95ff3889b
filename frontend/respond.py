"""One answer to a client, by ASGI: what every answer carries, and whether it has begun."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from frontend.errors import ApiError
from frontend.gate import Send
from frontend.headers import REQUEST_ID


class Reply:
    """`extra` headers are added as they become known, until the answer begins."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id = request_id
        self._send = send
        # The request's id, and behind it where it is answered.
        self.extra: list[tuple[bytes, bytes]] = [(REQUEST_ID, request_id.encode())]
        self.status: int | None = None  # once it has begun
        self.latest: bytes | None = None  # of a stream, what was sent last; comments do not count

    async def whole(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self.begin(status, [*headers, length])
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        assert self.status is None, "it has begun already"
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, *self.extra],
            }
        )

    async def part(self, data: bytes) -> None:
        self.latest = data
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def comment(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: ApiError, route: str) -> None:
        """As the answer, or as the last event of the stream that has begun."""
        if self.status is None:
            await self.whole(error.status, error.headers, error.body(route))
        else:
            await self.part(error.event(route))
            await self.end()
