"""Discovery in etcd (3.4 or newer), over its JSON gateway.

Leases, keys and watches are etcd's own: the server ends a dead process's lease. Of several URLs
the next is used when one fails. A watch that hears nothing for a while opens itself anew where it
was, unless the server is not the one it was; whatever else ends it, it begins from a listing.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator
from typing import Any, Final

import httpx2
import msgspec

from runtime.discovery.base import (
    WATCH_KEYS,
    Deleted,
    DiscoveryUnavailable,
    Put,
    ValueRefused,
    check_key,
)
from runtime.discovery.settings import DiscoverySettings
from runtime.discovery.store import LeaseLost, Snapshot
from runtime.tls import TlsSettings, client_context

REQUEST_TIMEOUT_S: Final = 3.0
WATCH_SILENCE_S: Final = 20.0
PAGE_KEYS: Final = 256
_NOT_FOUND: Final = 5  # gRPC's codes
_UNAUTHENTICATED: Final = 16

Answer = dict[str, Any]


class EtcdStore:
    kind = "etcd"

    def __init__(self, settings: DiscoverySettings) -> None:
        self.skipped_total = 0
        self._settings = settings
        self._urls = settings.etcd_urls
        self._turn = 0
        self._token: str | None = None
        timeout = httpx2.Timeout(min(REQUEST_TIMEOUT_S, settings.ttl / 3), pool=None)
        tls = TlsSettings(
            authority=settings.etcd_ca,
            certificate=settings.etcd_certificate,
            key=settings.etcd_key,
        )
        self._client = httpx2.AsyncClient(
            verify=client_context(tls),
            timeout=timeout,
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=4),
        )

    async def grant(self, ttl_s: float) -> str:
        answer = await self._ask("/v3/lease/grant", {"TTL": math.ceil(ttl_s), "ID": 0})
        return f"{int(answer['ID']):x}"

    async def renew(self, lease: str) -> None:
        answer = await self._ask("/v3/lease/keepalive", {"ID": _number(lease)})
        if int(answer.get("result", {}).get("TTL", 0)) <= 0:
            raise LeaseLost(f"etcd does not know the lease {lease} any more")

    async def revoke(self, lease: str) -> None:
        try:
            await self._ask("/v3/lease/revoke", {"ID": _number(lease)})
        except LeaseLost:
            return

    async def put(self, lease: str, key: str, value: bytes) -> None:
        body = {"key": _text(key.encode()), "value": _text(value), "lease": _number(lease)}
        await self._ask("/v3/kv/put", body)

    async def delete(self, lease: str, key: str) -> None:
        name = _text(key.encode())
        mine = {"key": name, "target": "LEASE", "result": "EQUAL", "lease": _number(lease)}
        delete = {"request_delete_range": {"key": name}}
        await self._ask("/v3/kv/txn", {"compare": [mine], "success": [delete]})

    async def list(self, prefix: str) -> dict[str, bytes]:
        values, _ = await self._list(prefix)
        return values

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot | Put | Deleted]:
        values, header = await self._list(prefix)
        yield Snapshot(values)
        cluster, seen = header["cluster_id"], int(header["revision"])
        while True:
            begin, end = _range(prefix)
            request = {"key": begin, "range_end": end, "start_revision": seen + 1}
            async for result in self._stream({"create_request": {**request, "fragment": True}}):
                now = result["header"]
                if result.get("canceled"):
                    why = result.get("cancel_reason") or "too old a revision"
                    raise DiscoveryUnavailable(f"etcd ended the watch: {why}")
                if now.get("cluster_id") != cluster or int(now.get("revision", 0)) < seen:
                    raise DiscoveryUnavailable("etcd has other data than before")
                for event in result.get("events", []):
                    seen = max(seen, int(event["kv"]["mod_revision"]))
                    change = self._change(event)
                    if change is not None:
                        yield change

    async def close(self) -> None:
        await self._client.aclose()

    # -- what etcd says -------------------------------------------------------------------

    async def _list(self, prefix: str) -> tuple[dict[str, bytes], Answer]:
        """All keys as of one revision, page by page."""
        begin, end = _range(prefix)
        values: dict[str, bytes] = {}
        header: Answer = {}
        while True:
            body: Answer = {"key": begin, "range_end": end, "limit": PAGE_KEYS}
            if header:
                body["revision"] = header["revision"]
            answer = await self._ask("/v3/kv/range", body)
            header = header or answer["header"]
            page = answer.get("kvs", [])
            for pair in page:
                put = self._pair(pair)
                if put is not None:
                    values[put.key] = put.value
            if not answer.get("more") or not page or len(values) > WATCH_KEYS:
                return values, header
            begin = _text(b64decode(page[-1]["key"]) + b"\0")

    def _change(self, event: Answer) -> Put | Deleted | None:
        put = self._pair(event["kv"])
        if put is None or event.get("type", "PUT") == "PUT":
            return put
        return Deleted(put.key)

    def _pair(self, pair: Answer) -> Put | None:
        """None for what is somebody else's in the same etcd."""
        try:
            key = b64decode(pair["key"]).decode("ascii")
            check_key(key)
        except (UnicodeDecodeError, ValueRefused):
            self.skipped_total += 1
            return None
        return Put(key, b64decode(pair.get("value", "")))

    # -- requests -------------------------------------------------------------------------

    async def _ask(self, path: str, body: Answer) -> Answer:
        url = self._url
        try:
            response = await self._client.post(
                f"{url}{path}", json=body, headers=await self._auth()
            )
            answer = _decode(response.content)
        except httpx2.HTTPError as error:
            raise self._failed(url, str(error) or type(error).__name__) from error
        if response.status_code != httpx2.codes.OK:
            raise self._refused(url, answer)
        return answer

    async def _stream(self, body: Answer) -> AsyncGenerator[Answer]:
        """Results until there is silence for too long; whatever else ends it raises."""
        url = self._url
        timeout = httpx2.Timeout(REQUEST_TIMEOUT_S, read=WATCH_SILENCE_S, pool=None)
        try:
            async with self._client.stream(
                *("POST", f"{url}/v3/watch"), json=body, timeout=timeout, headers=await self._auth()
            ) as response:
                async for line in response.aiter_lines():
                    answer = _decode(line.encode())
                    if "result" not in answer:
                        raise self._refused(url, answer)
                    yield answer["result"]
        except httpx2.ReadTimeout:
            return
        except httpx2.HTTPError as error:
            raise self._failed(url, str(error) or type(error).__name__) from error
        raise self._failed(url, "it ended the watch")

    async def _auth(self) -> dict[str, str]:
        user, password = self._settings.etcd_user, self._settings.etcd_password
        if user is None or password is None:
            return {}
        if self._token is None:
            url = self._url
            body = {"name": user, "password": password.get_secret_value()}
            response = await self._client.post(f"{url}/v3/auth/authenticate", json=body)
            answer = _decode(response.content)
            if response.status_code != httpx2.codes.OK:
                raise self._refused(url, answer)
            self._token = answer["token"]
        return {"Authorization": self._token or ""}

    @property
    def _url(self) -> str:
        return self._urls[self._turn % len(self._urls)]

    def _failed(self, url: str, why: str) -> DiscoveryUnavailable:
        if url == self._url:
            self._turn += 1
        return DiscoveryUnavailable(f"etcd at {url}: {why}")

    def _refused(self, url: str, answer: Answer) -> DiscoveryUnavailable:
        error = answer.get("error", answer)
        detail = error if isinstance(error, dict) else answer
        message = str(detail.get("message") or error)
        code = detail.get("code") or detail.get("grpc_code")
        if code == _NOT_FOUND and "lease" in message:
            return LeaseLost(message)
        if code == _UNAUTHENTICATED or "auth token" in message:
            self._token = None  # a new one with the next try
        return self._failed(url, message)


def _decode(content: bytes) -> Answer:
    try:
        answer = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise DiscoveryUnavailable(f"etcd's answer is no JSON: {content[:60]!r}") from error
    if not isinstance(answer, dict):
        raise DiscoveryUnavailable(f"etcd's answer is no object: {content[:60]!r}")
    return answer


def _range(prefix: str) -> tuple[str, str]:
    if not prefix:
        return _text(b"\0"), _text(b"\0")  # etcd's way to say: all
    return _text(prefix.encode()), _text(prefix[:-1].encode() + b"0")  # "0" follows "/"


def _number(lease: str) -> str:
    return str(int(lease, 16))


def _text(raw: bytes) -> str:
    return b64encode(raw).decode()
