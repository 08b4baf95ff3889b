"""docs/FRONTEND_API.md and the table in docs/FRONTEND.md: every route, and examples that run."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import validate
from starlette.routing import Route

from frontend.api import ROUTES, docs_page, openapi
from frontend.exchanges import make_exchanges
from frontend.gate import Gate
from frontend.keep_alive import COMMENT
from frontend.meter import Meter
from frontend.pages import Pages
from router.asks import BusyAsk
from runtime.engines.upstream import Upstream
from tests.frontend.engines import MODEL, InTurn, OneLimit, frontend
from tests.frontend.test_anthropic_client import answer as answer_message
from tests.frontend.test_responses import Keeping
from tests.frontend.token_engines import TokenEngine, token_frontend
from tests.plain_http import PLAIN
from tests.runtime.engines.scripted import Asked, Wire

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
KNOWN = {(method, route.path) for route in ROUTES for method in route.methods}
FROM_TOKENS = ("/v1/completions", "/v1/chat/completions")
ADMIN = {"authorization": "Bearer the-admin"}


def routes_in(text: str) -> list[tuple[str, str]]:
    """Of code spans such as `GET, DELETE /v1/things/{id}`."""
    return [
        (method, path)
        for methods, path in re.findall(r"`([A-Z]+(?:, [A-Z]+)*) (/[^`\s]*)`", text)
        for method in methods.split(", ")
    ]


# -- every route --------------------------------------------------------------------------


def test_the_list_is_what_is_served() -> None:
    fleet, gate, meter = InTurn([]), Gate((), 8, 1000), Meter()
    exchanges = make_exchanges(fleet, gate, meter, Upstream(1.0), migrations_max=0)
    served = [
        (method, route.path.replace(":path", ""))
        for route in Pages(fleet, gate, meter, OneLimit()).app(exchanges).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    ]
    assert len(served) == len(set(served))
    assert set(served) == KNOWN


def test_the_page_has_every_route_in_a_heading() -> None:
    page = (DOCS / "FRONTEND_API.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    found = routes_in("\n".join(headings))
    assert len(found) == len(set(found))
    assert set(found) == KNOWN


def test_the_table_has_every_route_and_says_which_test_holds_it() -> None:
    page = (DOCS / "FRONTEND.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    rows = [row for row in rows if routes_in(row[0])]
    found = [route for row in rows for route in routes_in(row[0])]
    assert len(found) == len(set(found))
    assert set(found) == KNOWN
    for _, _, tests in rows:
        names = re.findall(r"`(test_\w+\.py)`", tests)
        assert names, tests
        assert all((ROOT / "tests/frontend" / name).is_file() for name in names), tests


def test_the_lists_that_are_served() -> None:
    made = openapi("1.0")
    validate(made)
    paths = {(method.upper(), path) for path, of in made["paths"].items() for method in of}
    assert paths == KNOWN
    page = docs_page("1.0")
    assert all(route.path in page and route.what in page for route in ROUTES)
    assert not re.search(r"https?:|<script", page)  # it works where there is nothing else


@pytest.mark.parametrize("path", [r.path for r in ROUTES if r.takes not in (None, BusyAsk)])
async def test_what_is_passed_through_comes_to_the_engine_as_it_was(path: str) -> None:
    asked = {"model": MODEL, "input": "é", "prompt": "é", "messages": [], "token_ids": [5]}
    body = json.dumps(asked).encode()

    async def same(wire: Wire, asked: Asked) -> None:
        wire.whole(b'{"path": "%s"}' % asked.path.encode())

    async with frontend(same) as running, httpx.AsyncClient(verify=PLAIN) as http:
        reply = await http.post(f"{running.url}{path}?a=b%20c", content=body)
        assert reply.json() == {"path": f"{path}?a=b%20c"}
        assert running.fleet.engines[0].asked[0].body == body


# -- examples -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int
    answer_headers: dict[str, str]
    answer: str

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status}"


def _message(block: str) -> tuple[str, dict[str, str], str]:
    head, _, body = block.partition("\n\n")
    first, *lines = head.strip().split("\n")
    return first, dict(line.split(": ", 1) for line in lines), body.strip()


def examples() -> list[Example]:
    page = (DOCS / "FRONTEND_API.md").read_text().replace("my-model", MODEL)
    blocks = re.findall(r"```http\n(.*?)```", page, re.DOTALL)
    found = []
    for asked, answered in zip(blocks[::2], blocks[1::2], strict=True):
        first, headers, body = _message(asked)
        status, answer_headers, answer = _message(answered)
        method, path = first.split(" ")
        found.append(Example(method, path, headers, body, int(status), answer_headers, answer))
    return found


async def an_engine(wire: Wire, asked: Asked) -> None:
    if asked.path == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}]
        wire.whole(json.dumps({"object": "list", "data": data, "model": MODEL}).encode())
    elif asked.path == "/tokenize":
        wire.whole(b'{"count": 2, "max_model_len": 4096, "tokens": [5, 7]}')
    elif asked.path == "/inference/v1/generate":
        choice = {"index": 0, "token_ids": [13, 17], "finish_reason": "length"}
        wire.whole(json.dumps({"request_id": "r1", "choices": [choice]}).encode())
    else:
        await answer_message(wire, asked)


@contextlib.asynccontextmanager
async def serving(example: Example) -> AsyncIterator[httpx.AsyncClient]:
    gate = Gate((), 8, 1 << 20, admin_keys=("the-admin",))
    if example.path in FROM_TOKENS:
        engine = TokenEngine(1, " jumps over the lazy dog")
        async with token_frontend(engine) as asking:
            yield asking.http
        return
    keeping = Keeping("")
    script = keeping if "/v1/responses" in example.path else an_engine
    async with (
        frontend(script, gate=gate) as running,
        httpx.AsyncClient(base_url=running.url, verify=PLAIN) as http,
    ):
        if example.path.startswith("/v1/responses/"):
            await http.post("/v1/responses", json={"model": MODEL, "input": "Hello"})
        yield http


def plain(text: str) -> Any:
    """What is another each time is made the same."""
    text = re.sub(r'"(id|version)":\s*"(chatcmpl-|cmpl-)?[^"]*"', r'"\1": "\2"', text)
    text = re.sub(r'"created":\s*\d+', '"created": 0', text)
    if text.startswith(("data:", "event:", COMMENT.decode())):
        events = [event for event in text.strip().split("\n\n") if not event.startswith(":")]
        return [tuple(map(_line, event.split("\n"))) for event in events]
    return json.loads(text)


def _line(line: str) -> Any:
    name, _, value = line.partition(": ")
    return name, json.loads(value) if value.startswith("{") else value


@pytest.mark.parametrize(
    "example", [pytest.param(one, id=f"{n}: {one}") for n, one in enumerate(examples(), 1)]
)
async def test_an_example_of_the_page(example: Example) -> None:
    async with serving(example) as http:
        reply = await http.request(
            example.method, example.path, content=example.body, headers=example.headers
        )
        assert reply.status_code == example.status, reply.text
        assert plain(reply.text) == plain(example.answer), reply.text
        told = {name: reply.headers.get(name) for name in example.answer_headers}
        assert told == example.answer_headers
