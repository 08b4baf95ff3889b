"""An API server that keeps objects by the rules of Kubernetes, over real HTTP.

Lists are paged and have a version; watches replay from one, send bookmarks, end in time, and say
410 where the past was thrown away; writes conflict; what a deleted Lease owned is collected.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Object = dict[str, Any]
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class Refused(Exception):
    def __init__(self, code: int, why: str) -> None:
        self.code = code
        self.status = {"kind": "Status", "status": "Failure", "code": code, "message": why}
        super().__init__(why)


class KubeServer:
    def __init__(self, port: int, token: str) -> None:
        self.port = port
        self.token = token
        self.version = 100
        self.oldest = 100  # changes before this one are forgotten
        self.objects: dict[tuple[str, str, str], Object] = {}  # namespace, plural, name
        self.log: list[tuple[int, str, tuple[str, str, str], Object]] = []
        self.watches_total = 0
        self.bookmarks_total = 0
        self.gone_total = 0
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def start(self) -> None:
        self._closing = asyncio.Event()
        routes = [
            Route(f"{group}/namespaces/{{namespace}}/{{plural}}{name}", self._handle, methods=verbs)
            for group in ("/api/v1", "/apis/coordination.k8s.io/v1", "/apis/apps/v1")
            for name, verbs in (
                ("", ["GET", "POST", "DELETE"]),
                ("/{name}", ["GET", "PUT", "PATCH", "DELETE"]),
                ("/{name:path}", ["GET", "PATCH"]),  # NAME/scale
            )
        ]
        config = uvicorn.Config(
            Starlette(routes=routes),
            host="127.0.0.1",
            port=self.port,
            log_config=None,  # logging is the whole process's, and other tests look at it
            access_log=False,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server.serve())
        async with asyncio.timeout(60):
            while not self._server.started:
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None and self._task is not None:
            self._closing.set()
            server.should_exit = True
            await self._task

    def forget_past(self) -> None:
        """As a compaction does; open watches are ended."""
        self.log.clear()
        self.version += 1
        self.oldest = self.version
        closing, self._closing = self._closing, asyncio.Event()
        closing.set()

    def drop(self, plural: str, name: str) -> None:
        for key in [key for key in self.objects if key[1:] == (plural, name)]:
            self._delete(key)

    async def _handle(self, request: Request) -> Response:
        try:
            if request.headers.get("authorization") != f"Bearer {self.token}":
                raise Refused(401, "Unauthorized")
            if "watch" in request.query_params:
                return self._watch(request)
            return JSONResponse(await self._answer(request))
        except Refused as refused:
            return JSONResponse(refused.status, refused.code)

    async def _answer(self, request: Request) -> Object:
        space, plural = request.path_params["namespace"], request.path_params["plural"]
        name = request.path_params.get("name")
        body: Object = json.loads(await request.body() or b"{}")
        selector = request.query_params.get("labelSelector", "")
        if name is None:
            match request.method:
                case "GET":
                    return self._list(request, space, plural, selector)
                case "POST":
                    return self._create((space, plural, body["metadata"]["name"]), body)
                case _:
                    for key in self._selected(space, plural, selector):
                        self._delete(key)
                    return {"kind": "Status", "status": "Success"}
        key = (space, plural, name)
        if key not in self.objects:
            raise Refused(404, f"{plural} {name!r} not found")
        present = self.objects[key]
        match request.method:
            case "GET":
                return present
            case "PUT":
                given = body["metadata"].get("resourceVersion")
                if given not in {None, present["metadata"]["resourceVersion"]}:
                    raise Refused(409, "the object has been modified")
                uid = present["metadata"]["uid"]
                return self._store(
                    "MODIFIED", key, body | {"metadata": body["metadata"] | {"uid": uid}}
                )
            case "PATCH":
                if request.headers["content-type"] != "application/merge-patch+json":
                    raise Refused(415, "unsupported media type")
                return self._store("MODIFIED", key, _merged(present, body))
            case _:
                wanted = body.get("preconditions", {}).get("resourceVersion")
                if wanted not in {None, present["metadata"]["resourceVersion"]}:
                    raise Refused(409, "the precondition does not hold")
                return self._delete(key)

    def _list(self, request: Request, space: str, plural: str, selector: str) -> Object:
        keys = sorted(self._selected(space, plural, selector))
        begin = int(request.query_params.get("continue", "0"))
        end = begin + int(request.query_params.get("limit", len(keys) or 1))
        about = {"resourceVersion": str(self.version)}
        if end < len(keys):
            about["continue"] = str(end)
        return {"metadata": about, "items": [self.objects[key] for key in keys[begin:end]]}

    def _create(self, key: tuple[str, str, str], body: Object) -> Object:
        if _NAME.fullmatch(key[2]) is None:
            raise Refused(422, f"the name {key[2]!r} is invalid")
        if key in self.objects:
            raise Refused(409, f"{key[1]} {key[2]!r} already exists")
        uid = secrets.token_hex(16)
        return self._store("ADDED", key, body | {"metadata": body["metadata"] | {"uid": uid}})

    def _store(self, kind: str, key: tuple[str, str, str], item: Object) -> Object:
        self.version += 1
        item = item | {"metadata": item["metadata"] | {"resourceVersion": str(self.version)}}
        self.objects[key] = item
        self.log.append((self.version, kind, key, item))
        return item

    def _delete(self, key: tuple[str, str, str]) -> Object:
        item = self.objects.pop(key)
        self.version += 1
        item = item | {"metadata": item["metadata"] | {"resourceVersion": str(self.version)}}
        self.log.append((self.version, "DELETED", key, item))
        owned = [
            other
            for other, held in self.objects.items()
            if any(
                owner["uid"] == item["metadata"]["uid"]
                for owner in held["metadata"].get("ownerReferences", [])
            )
        ]
        for other in owned:
            self._delete(other)
        return item

    def _selected(self, space: str, plural: str, selector: str) -> list[tuple[str, str, str]]:
        return [
            key
            for key, item in self.objects.items()
            if key[:2] == (space, plural) and _has(item, selector)
        ]

    def _watch(self, request: Request) -> Response:
        self.watches_total += 1
        return StreamingResponse(self._lines(request), media_type="application/json")

    async def _lines(self, request: Request) -> AsyncIterator[bytes]:
        query = request.query_params
        space, plural = request.path_params["namespace"], request.path_params["plural"]
        seen, closing = int(query["resourceVersion"]), self._closing
        if seen < self.oldest:
            self.gone_total += 1
            yield _line("ERROR", Refused(410, "too old resource version").status)
            return
        end_s = asyncio.get_running_loop().time() + float(query["timeoutSeconds"])
        idle = 0
        while not closing.is_set() and asyncio.get_running_loop().time() < end_s:
            fresh = [entry for entry in self.log if entry[0] > seen]
            for version, kind, key, item in fresh:
                seen = version
                if key[:2] == (space, plural) and _has(item, query.get("labelSelector", "")):
                    idle = 0
                    yield _line(kind, item)
            idle += 1
            if idle % 20 == 0 and query.get("allowWatchBookmarks") == "true":
                self.bookmarks_total += 1
                yield _line("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})
            await asyncio.sleep(0.01)


def _line(kind: str, item: Object) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"


def _has(item: Object, selector: str) -> bool:
    if not selector:
        return True
    label, _, value = selector.partition("=")
    return bool(item["metadata"].get("labels", {}).get(label) == value)


def _merged(present: Object, change: Object) -> Object:
    return present | {
        name: _merged(present.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
