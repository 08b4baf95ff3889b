"""The request plane over HTTP/1.1, for where only that passes: a POST for each request.

`POST /requests/ENDPOINT` has the payload as its body and the headers as headers; the answer is a
stream of frames as over TCP (`Item`, `Ping` when there was nothing to send, `End`), its status
says how the request was met. `POST /stops/STREAM` asks a running handler to finish. The flow is
TCP's: a slow reader's socket fills, and the handler waits. Closing the connection cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from runtime.requests.base import (
    PRIORITY,
    REQUEST_ID,
    TRACEPARENT,
    TRACESTATE,
    RequestClient,
    RequestServer,
)
from runtime.requests.settings import RequestPlaneSettings

MEDIA_TYPE: Final = "application/x-kvbm-frames"
REQUESTS: Final = "/requests/"
STOPS: Final = "/stops/"
TIMEOUT: Final = "kvbm-timeout-s"
STREAM: Final = "kvbm-stream"  # the client's name for it, for `/stops/`
_OTHER: Final = "kvbm-header-"  # before every header that is not one of
_PLAIN: Final = frozenset({REQUEST_ID, TRACEPARENT, TRACESTATE, PRIORITY})


class HttpPlane:
    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name

    def server(self) -> RequestServer:
        from runtime.requests.http_server import HttpServer

        return HttpServer(self._settings)

    def client(self) -> RequestClient:
        from runtime.requests.http_client import HttpClient

        return HttpClient(self._settings, self._name)


def to_wire(headers: Mapping[str, str]) -> dict[str, str]:
    return {name if name in _PLAIN else _OTHER + name: value for name, value in headers.items()}


def from_wire(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """What a request's headers were; those of HTTP itself are left out."""
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if name in _PLAIN:
            found[name] = value
        elif name.startswith(_OTHER):
            found[name.removeprefix(_OTHER)] = value
    return found
