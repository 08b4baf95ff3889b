"""Discovery in the Kubernetes API: a Lease for each process, a ConfigMap for each value.

Each ConfigMap is owned by its process's Lease, so the cluster collects what a dead process left
once the Lease is deleted, which whoever watches does. Kubernetes ends no Lease: watchers judge by
whether it is renewed, and look again before they tell of an end, so that being cut off ends nobody.
The account may get, list, watch, create, update, patch, delete and deletecollection both kinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Iterable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final

from runtime.discovery.base import Deleted, Put
from runtime.discovery.kubernetes_api import (
    CONFIG_MAPS,
    LEASES,
    Api,
    NotFound,
    Object,
    Resource,
    WriteConflict,
)
from runtime.discovery.kubernetes_objects import (
    DISCOVERY_LABEL,
    KEY_ANNOTATION,
    LEASE_LABEL,
    VALUE,
    VERSION,
    Entry,
    LeaseMark,
    ObjectBroken,
    decode_entry,
    decode_lease,
)
from runtime.discovery.liveness import Liveness
from runtime.discovery.settings import DiscoverySettings
from runtime.discovery.store import LeaseLost, Snapshot, changes

SWEEP_TTLS: Final = 3.0  # dead leases are deleted after this many times their life
LOOK_S: Final = 0.25  # how often a watcher looks for leases that fell silent
GATHER_S: Final = 0.02  # changes that come together are told together
PUT_ATTEMPTS: Final = 3


class _Mirror:
    """What the API server has of both kinds, as far as a watch was told."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.leases: dict[str, LeaseMark] = {}
        self.listed: set[Resource] = set()
        self.changed = asyncio.Event()


class KubernetesStore:
    kind = "kubernetes"

    def __init__(self, settings: DiscoverySettings, environ: Mapping[str, str]) -> None:
        self.skipped_total = 0
        self._api = Api(settings, environ)
        self._liveness = Liveness()
        self._granted: dict[str, tuple[str, float, float]] = {}  # uid, ttl, last renewed

    async def grant(self, ttl_s: float) -> str:
        lease = f"kvbm-{secrets.token_hex(8)}"
        asked_s = time.monotonic()
        body: Object = {
            "metadata": {"name": lease, "labels": {DISCOVERY_LABEL: VERSION}},
            "spec": {
                "holderIdentity": lease,
                "leaseDurationSeconds": math.ceil(ttl_s),
                "renewTime": _now(),
            },
        }
        made = await self._api.create(LEASES, body)
        # One lease at a time: those before are lost.
        self._granted = {lease: (made["metadata"]["uid"], ttl_s, asked_s)}
        return lease

    async def renew(self, lease: str) -> None:
        uid, ttl_s, renewed_s = self._granted[lease]
        asked_s = time.monotonic()
        if asked_s - renewed_s > math.ceil(ttl_s):
            # Watchers may have told of its end: begin anew rather than come back to life.
            await self.revoke(lease)
            raise LeaseLost(f"the lease {lease} was not renewed for {asked_s - renewed_s:.1f} s")
        try:
            await self._api.patch(LEASES, lease, {"spec": {"renewTime": _now()}})
        except NotFound as error:
            raise LeaseLost(f"the lease {lease} is not there any more") from error
        self._granted[lease] = (uid, ttl_s, asked_s)

    async def revoke(self, lease: str) -> None:
        await self._api.delete_all(CONFIG_MAPS, f"{LEASE_LABEL}={lease}")
        with contextlib.suppress(NotFound):
            await self._api.delete(LEASES, lease)

    async def put(self, lease: str, key: str, value: bytes) -> None:
        owner = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "name": lease,
            "uid": self._granted[lease][0],
        }
        body: Object = {
            "metadata": {
                "name": _name(key),
                "labels": {DISCOVERY_LABEL: VERSION, LEASE_LABEL: lease},
                "annotations": {KEY_ANNOTATION: key},
                "ownerReferences": [owner],
            },
            "binaryData": {VALUE: b64encode(value).decode()},
        }
        for left in reversed(range(PUT_ATTEMPTS)):
            try:
                await self._api.replace(CONFIG_MAPS, _name(key), body)
            except NotFound:
                try:
                    await self._api.create(CONFIG_MAPS, body)
                except WriteConflict:  # made by another at this moment
                    if not left:
                        raise
                    continue
            return

    async def delete(self, lease: str, key: str) -> None:
        with contextlib.suppress(NotFound, WriteConflict):
            found = await self._api.get(CONFIG_MAPS, _name(key))
            if found["metadata"].get("labels", {}).get(LEASE_LABEL) == lease:
                version = found["metadata"]["resourceVersion"]
                await self._api.delete(CONFIG_MAPS, _name(key), version)

    async def list(self, prefix: str) -> dict[str, bytes]:
        mirror = _Mirror()
        for resource in (LEASES, CONFIG_MAPS):
            found, _ = await self._api.list(resource, _SELECTOR)
            self._take_list(mirror, resource, found)
        return self._values(mirror, prefix)

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot | Put | Deleted]:
        mirror = _Mirror()
        tasks = [
            asyncio.create_task(
                self._reflect(mirror, resource), name=f"discovery-{resource.plural}"
            )
            for resource in (LEASES, CONFIG_MAPS)
        ]
        told: dict[str, bytes] | None = None
        dead: set[str] = set()
        try:
            while True:
                await _changed(mirror)
                for task in tasks:
                    if task.done():
                        task.result()
                if len(mirror.listed) < len(tasks):
                    continue
                dead = await self._confirm_dead(mirror, dead)
                values = self._values(mirror, prefix)
                for change in changes(told, values):
                    yield change
                told = values
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        await self._api.close()

    # -- what the API server has ----------------------------------------------------------

    async def _reflect(self, mirror: _Mirror, resource: Resource) -> None:
        """List, then follow; ends with an error, also where the past is gone (410)."""
        try:
            found, version = await self._api.list(resource, _SELECTOR)
            self._take_list(mirror, resource, found)
            mirror.changed.set()
            async for kind, item in self._api.watch(resource, _SELECTOR, version):
                if kind == "DELETED":
                    name = str(item["metadata"]["name"])
                    (mirror.leases if resource is LEASES else mirror.entries).pop(name, None)
                else:
                    self._take(mirror, resource, item)
                mirror.changed.set()
        finally:
            mirror.changed.set()

    def _take_list(self, mirror: _Mirror, resource: Resource, found: Iterable[Object]) -> None:
        (mirror.leases if resource is LEASES else mirror.entries).clear()
        for item in found:
            self._take(mirror, resource, item)
        mirror.listed.add(resource)
        if resource is LEASES:
            self._liveness.keep(mirror.leases.keys())

    def _take(self, mirror: _Mirror, resource: Resource, item: Object) -> None:
        name = str(item["metadata"]["name"])
        try:
            if resource is LEASES:
                mirror.leases[name] = mark = decode_lease(item)
                self._silence_s(name, mark)
            else:
                mirror.entries[name] = decode_entry(item)
        except ObjectBroken:
            self.skipped_total += 1
            (mirror.leases if resource is LEASES else mirror.entries).pop(name, None)

    def _values(self, mirror: _Mirror, prefix: str) -> dict[str, bytes]:
        dead = self._dead(mirror)
        return {
            entry.key: entry.value
            for entry in mirror.entries.values()
            if entry.key.startswith(prefix)
            and entry.lease in mirror.leases
            and entry.lease not in dead
        }

    async def _confirm_dead(self, mirror: _Mirror, known: set[str]) -> set[str]:
        """Who is silent also by a fresh listing; those long dead are deleted."""
        if self._dead(mirror) - known:
            found, _ = await self._api.list(LEASES, _SELECTOR)
            self._take_list(mirror, LEASES, found)
        dead = self._dead(mirror)
        for name in dead:
            mark = mirror.leases[name]
            if self._silence_s(name, mark) > SWEEP_TTLS * mark.ttl_s:
                with contextlib.suppress(NotFound, WriteConflict):
                    await self._api.delete(LEASES, name, mark.version)
        return dead

    def _dead(self, mirror: _Mirror) -> set[str]:
        leases = mirror.leases.items()
        return {name for name, mark in leases if self._silence_s(name, mark) > mark.ttl_s}

    def _silence_s(self, name: str, mark: LeaseMark) -> float:
        age_s = (datetime.now(UTC) - mark.renewed).total_seconds()
        return self._liveness.silence_s(name, mark.renewed.isoformat(), age_s)


_SELECTOR: Final = f"{DISCOVERY_LABEL}={VERSION}"


async def _changed(mirror: _Mirror) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOOK_S):
            await mirror.changed.wait()
            await asyncio.sleep(GATHER_S)
    mirror.changed.clear()


def _name(key: str) -> str:
    """Keys have characters and lengths that names of objects may not have."""
    return f"kvbm-{sha256(key.encode()).hexdigest()[:40]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
