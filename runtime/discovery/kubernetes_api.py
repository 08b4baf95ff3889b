"""As much of the Kubernetes API as discovery needs, as its service account sees it from a pod.

The token is read anew for each request, because the cluster replaces it. A watch resumes from the
last version it was told, bookmarks included; where the server no longer has that past (410), and
wherever else it ends, it raises, and the caller lists again.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
import msgspec

from runtime.discovery.base import DiscoveryUnavailable
from runtime.discovery.settings import DiscoverySettings
from runtime.settings import Problem, SettingsError

REQUEST_TIMEOUT_S: Final = 3.0
WATCH_S: Final = 60  # the server ends a watch then, and it is opened anew
WATCH_GRACE_S: Final = 5.0
PAGE_OBJECTS: Final = 500
_JSON: Final = "application/json"
_MERGE: Final = "application/merge-patch+json"

Object = dict[str, Any]


class NotFound(DiscoveryUnavailable):
    """There is no such object."""


class WriteConflict(DiscoveryUnavailable):
    """The object exists already, or has changed."""


@dataclass(frozen=True, slots=True)
class Resource:
    group: str
    plural: str


CONFIG_MAPS: Final = Resource("api/v1", "configmaps")
LEASES: Final = Resource("apis/coordination.k8s.io/v1", "leases")


class Api:
    def __init__(self, settings: DiscoverySettings, environ: Mapping[str, str]) -> None:
        """Raises SettingsError outside of a pod, if the settings do not say where to go."""
        account = settings.kubernetes_account
        self._token = account / "token"
        self._url = (settings.kubernetes_url or _in_cluster(environ)).rstrip("/")
        self._namespace = settings.kubernetes_namespace or _read(account / "namespace") or "default"
        authority = account / "ca.crt"
        self._client = httpx2.AsyncClient(
            verify=ssl.create_default_context(cafile=authority if authority.exists() else None),
            timeout=httpx2.Timeout(min(REQUEST_TIMEOUT_S, settings.ttl / 3), pool=None),
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=4),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, resource: Resource, name: str) -> Object:
        return await self._ask("GET", self._path(resource, name))

    async def create(self, resource: Resource, item: Object) -> Object:
        return await self._ask("POST", self._path(resource), item)

    async def replace(self, resource: Resource, name: str, item: Object) -> Object:
        return await self._ask("PUT", self._path(resource, name), item)

    async def patch(self, resource: Resource, name: str, change: Object) -> Object:
        return await self._ask("PATCH", self._path(resource, name), change, kind=_MERGE)

    async def delete(self, resource: Resource, name: str, version: str | None = None) -> None:
        """If it has that version still; otherwise raises WriteConflict."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if version is not None:
            body["preconditions"] = {"resourceVersion": version}
        await self._ask("DELETE", self._path(resource, name), body)

    async def delete_all(self, resource: Resource, selector: str) -> None:
        await self._ask("DELETE", self._path(resource), None, {"labelSelector": selector})

    async def list(self, resource: Resource, selector: str) -> tuple[list[Object], str]:
        """All objects, page by page, and the version that a watch goes on from."""
        found: list[Object] = []
        query = {"labelSelector": selector, "limit": str(PAGE_OBJECTS)}
        while True:
            page = await self._ask("GET", self._path(resource), None, query)
            found += page.get("items") or []
            more = page["metadata"].get("continue")
            if not more:
                return found, str(page["metadata"]["resourceVersion"])
            query["continue"] = more

    async def watch(
        self, resource: Resource, selector: str, version: str
    ) -> AsyncGenerator[tuple[str, Object]]:
        """Changes after `version`, as ADDED, MODIFIED or DELETED and the object."""
        timeout = httpx2.Timeout(REQUEST_TIMEOUT_S, read=WATCH_S + WATCH_GRACE_S, pool=None)
        while True:
            query = {
                "labelSelector": selector,
                "watch": "1",
                "allowWatchBookmarks": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(WATCH_S),
            }
            url = f"{self._url}{self._path(resource)}"
            try:
                async with self._client.stream(
                    "GET", url, params=query, timeout=timeout, headers=self._headers(_JSON)
                ) as response:
                    if response.status_code != httpx2.codes.OK:
                        raise self._refused(response.status_code, await response.aread())
                    async for line in response.aiter_lines():
                        event = _decode(line.encode())
                        item = event["object"]
                        if event["type"] == "ERROR":
                            raise self._refused(int(item.get("code", 0)), line.encode())
                        version = str(item["metadata"]["resourceVersion"])
                        if event["type"] != "BOOKMARK":
                            yield event["type"], item
            except (httpx2.HTTPError, KeyError, TypeError) as error:
                raise self._failed(str(error) or type(error).__name__) from error

    async def _ask(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        query: dict[str, str] | None = None,
        kind: str = _JSON,
    ) -> Object:
        try:
            response = await self._client.request(
                method,
                f"{self._url}{path}",
                params=query,
                content=msgspec.json.encode(body) if body is not None else None,
                headers=self._headers(kind),
            )
        except httpx2.HTTPError as error:
            raise self._failed(str(error) or type(error).__name__) from error
        if not response.is_success:
            raise self._refused(response.status_code, response.content)
        return _decode(response.content)

    def _path(self, resource: Resource, name: str | None = None) -> str:
        path = f"/{resource.group}/namespaces/{self._namespace}/{resource.plural}"
        return path if name is None else f"{path}/{name}"

    def _headers(self, kind: str) -> dict[str, str]:
        token = _read(self._token)
        return {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})

    def _refused(self, status: int, content: bytes) -> DiscoveryUnavailable:
        why = f"the Kubernetes API answered {status}: {content[:300].decode(errors='replace')}"
        match status:
            case httpx2.codes.NOT_FOUND:
                return NotFound(why)
            case httpx2.codes.CONFLICT:
                return WriteConflict(why)
            case _:
                return DiscoveryUnavailable(why)

    def _failed(self, why: str) -> DiscoveryUnavailable:
        return DiscoveryUnavailable(f"the Kubernetes API at {self._url}: {why}")


def _in_cluster(environ: Mapping[str, str]) -> str:
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        reason = "required outside of a pod, for example https://10.0.0.1:6443"
        raise SettingsError([Problem("kubernetes_url", "defaults", reason)])
    port = environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _read(path: Path) -> str:
    """Empty if there is none: an API server may be reached without."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _decode(content: bytes) -> Object:
    try:
        answer = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise DiscoveryUnavailable(f"the answer is no JSON: {content[:60]!r}") from error
    if not isinstance(answer, dict):
        raise DiscoveryUnavailable(f"the answer is no object: {content[:60]!r}")
    return answer
