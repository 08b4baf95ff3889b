"""The admin API as the commands ask it: an answer, or a `Failure` that says in one sentence why."""

from __future__ import annotations

import contextlib
import http.client
import json
from http import HTTPStatus
from typing import Any, Final, Self
from urllib.parse import urlencode, urlsplit

from runtime.secret import read_secret

TIMEOUT_S: Final = 10.0
BODY_BYTES_MAX: Final = 64 << 20

Json = dict[str, Any]


class Failure(Exception):
    """The command cannot do what it was asked to; the message is for the operator."""


class Unreachable(Failure):
    """There is no daemon at the address."""


class Refused(Failure):
    """The daemon answered with a problem."""

    def __init__(self, status: int, problem: Json) -> None:
        super().__init__(str(problem.get("detail") or f"the daemon answered with status {status}"))
        self.status = status
        self.problem = problem


class AdminClient:
    """One daemon. Use it as a context manager."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        self._place = urlsplit(self.url)
        if self._place.scheme not in {"http", "https"} or not self._place.hostname:
            raise Failure(f"{url!r} is no address like http://127.0.0.1:9470; see --url")
        try:
            secret = read_secret(token)
        except ValueError as error:
            raise Failure(str(error)) from error
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # each request has a connection of its own

    def get(self, path: str, parameters: Json | None = None, *, wait_s: float = 0.0) -> Json:
        """Read; the daemon takes up to `wait_s` seconds for it."""
        return self._ask("GET", path, parameters or {}, wait_s)

    def post(
        self, path: str, parameters: Json | None = None, *, wait_s: float | None = None
    ) -> Json:
        """Act; the daemon takes up to `wait_s` seconds for it if that is given."""
        deadline = {} if wait_s is None else {"deadline_s": str(wait_s)}
        return self._ask("POST", path, {**(parameters or {}), **deadline}, wait_s or 0.0)

    def readiness(self) -> dict[str, str]:
        """Each check's "ok", or the reason why it is not."""
        try:
            checks: dict[str, str] = self.get("/readyz")["checks"]
        except Refused as refused:
            if "checks" not in refused.problem:
                raise
            checks = refused.problem["checks"]
        return checks

    def _ask(self, method: str, path: str, parameters: Json, wait_s: float) -> Json:
        try:
            status, text = self._request(method, path, parameters, TIMEOUT_S + wait_s)
            body = json.loads(text)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(
                f"no kvbm-daemon answers at {self.url}: {str(error) or type(error).__name__}; "
                "start it, or name its admin address with --url"
            ) from error
        except ValueError as error:
            raise Failure(f"what answers at {self.url} is no kvbm-daemon") from error
        if not isinstance(body, dict):
            raise Failure(f"what answers at {self.url} is no kvbm-daemon")
        if status >= HTTPStatus.BAD_REQUEST:
            raise Refused(status, body)
        return body

    def _request(
        self, method: str, path: str, parameters: Json, timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and body. The standard library's client: it loads in a tenth of the others' time.

        It knows of no proxy: one for the world outside is none for the daemon on this node.
        """
        secure = self._place.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        query = f"?{urlencode(parameters)}" if parameters else ""
        with contextlib.closing(kind(self._place.netloc, timeout=timeout_s)) as connection:
            connection.request(method, f"{self._place.path}{path}{query}", headers=self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read(BODY_BYTES_MAX)
