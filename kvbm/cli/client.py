"""The admin API as the commands ask it: an answer, or a `Failure` that says in one sentence why."""

from __future__ import annotations

from typing import Any, Final, Self

import httpx2

from runtime.units import read_secret

TIMEOUT_S: Final = 10.0

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
        try:
            secret = read_secret(token)
        except ValueError as error:
            raise Failure(str(error)) from error
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        # A proxy for the world outside is none for the daemon on this node.
        self._http = httpx2.Client(headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Json:
        return self._ask("GET", path, {}, 0.0)

    def post(self, path: str, *, wait_s: float | None = None) -> Json:
        """Act; the daemon takes up to `wait_s` seconds for it if that is given."""
        parameters = {} if wait_s is None else {"deadline_s": str(wait_s)}
        return self._ask("POST", path, parameters, wait_s or 0.0)

    def readiness(self) -> dict[str, str]:
        """Each check's "ok", or the reason why it is not."""
        try:
            checks: dict[str, str] = self.get("/readyz")["checks"]
        except Refused as refused:
            if "checks" not in refused.problem:
                raise
            checks = refused.problem["checks"]
        return checks

    def _ask(self, method: str, path: str, parameters: dict[str, str], wait_s: float) -> Json:
        try:
            answer = self._http.request(
                method, f"{self.url}{path}", params=parameters, timeout=TIMEOUT_S + wait_s
            )
            body = answer.json()
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise Unreachable(
                f"no kvbm-daemon answers at {self.url}: {str(error) or type(error).__name__}; "
                "start it, or name its admin address with --url"
            ) from error
        except ValueError as error:
            raise Failure(f"what answers at {self.url} is no kvbm-daemon") from error
        if not isinstance(body, dict):
            raise Failure(f"what answers at {self.url} is no kvbm-daemon")
        if answer.is_error:
            raise Refused(answer.status_code, body)
        return body
