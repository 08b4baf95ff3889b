"""What clients may rely on beside the answers: errors, methods, headers, keys, browsers."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import openai
import pytest

from frontend.gate import Gate
from frontend.settings import OpenAiSettings
from tests.frontend.engines import MODEL, Running, frontend
from tests.frontend.test_openai_client import MESSAGES, client
from tests.frontend.token_engines import TokenEngine, token_frontend
from tests.runtime.engines.scripted import Asked, Wire

JSON = {"content-type": "application/json"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "hello"}
GUARDED: dict[str, Any] = {"requests_max": 8, "body_bytes_max": 1000, "admin_keys": ("the-admin",)}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def answer(wire: Wire, asked: Asked) -> None:
    wire.whole(b'{"object":"text_completion"}')


def http(running: Running, **given: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.url, **given)


def error_of(reply: httpx.Response) -> tuple[Any, ...]:
    """What is in every error, below a status that fits its type."""
    told = reply.json()
    assert set(told) == {"error"}, told
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["content-type"] == "application/json"
    assert told["error"]["message"]
    return reply.status_code, told["error"]["type"], told["error"]["code"], told["error"]["param"]


BAD = "invalid_request_error"
LARGE = {**COMPLETION, "prompt": "x" * 1001}


@pytest.mark.parametrize("tokens", [False, True], ids=["passed through", "from tokens"])
@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("completions", b"{", (400, BAD, "invalid_json", None)),
        ("completions", b"", (400, BAD, "invalid_json", None)),
        ("completions", b'"text"', (400, BAD, "invalid_value", None)),
        ("completions", b'{"model": "\xff"}', (400, BAD, "invalid_json", None)),
        ("completions", {"prompt": "x"}, (400, BAD, "missing", "model")),
        ("completions", {**COMPLETION, "model": 5}, (400, BAD, "invalid_value", "model")),
        (
            "completions",
            {**COMPLETION, "model": "a/b"},
            (404, "not_found_error", "model_not_found", "model"),
        ),
        ("completions", {**COMPLETION, "n": "two"}, (400, BAD, "invalid_value", "n")),
        ("completions", {**COMPLETION, "prompt": {}}, (400, BAD, "invalid_value", "prompt")),
        (
            "completions",
            {**COMPLETION, "stream_options": {"include_usage": 3}},
            (400, BAD, "invalid_value", "stream_options.include_usage"),
        ),
        ("chat/completions", {"model": MODEL}, (400, BAD, "missing", "messages")),
        ("chat/completions", {**CHAT, "messages": "x"}, (400, BAD, "invalid_value", "messages")),
        (
            "chat/completions",
            {**CHAT, "messages": ["x"]},
            (400, BAD, "invalid_value", "messages[0]"),
        ),
        ("responses", {"model": MODEL}, (400, BAD, "missing", "input")),
        ("completions", LARGE, (413, BAD, "body_too_large", None)),
    ],
)
async def test_a_request_that_is_wrong(
    path: str, body: Any, expected: tuple[Any, ...], tokens: bool
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    if tokens:
        async with token_frontend(TokenEngine(1, "x"), body_bytes_max=1000) as asking:
            reply = await asking.http.post(f"/v1/{path}", content=data, headers=JSON)
    else:
        async with frontend(answer, gate=Gate((), 8, 1000)) as running, http(running) as asks:
            reply = await asks.post(f"/v1/{path}", content=data, headers=JSON)
    assert error_of(reply) == expected


async def test_a_prompt_that_does_not_fit() -> None:
    async with token_frontend(TokenEngine(1, "x")) as asking:
        for path, body, limit in (
            ("completions", {**COMPLETION, "prompt": [1] * 4097}, "max_tokens"),
            ("completions", {**COMPLETION, "max_tokens": 4096}, "max_tokens"),
            ("chat/completions", {**CHAT, "max_completion_tokens": 4096}, "max_tokens"),
        ):
            reply = await asking.http.post(f"/v1/{path}", json=body)
            assert error_of(reply) == (400, BAD, "context_length_exceeded", limit)
            assert "4096" in reply.json()["error"]["message"]


async def test_routes_that_a_model_does_not_have() -> None:
    async with token_frontend(TokenEngine(1, "x")) as asking:
        asking.fleet.places = list  # type: ignore[method-assign]
        asking.fleet.engines = [TokenEngine(1, "x")]  # type: ignore[list-item]
        for path, body in (("/v1/responses", {"input": "x"}), ("/v1/embeddings", {"input": "x"})):
            reply = await asking.http.post(path, json={"model": MODEL, **body})
            assert error_of(reply) == (400, BAD, "unsupported", "model")


@pytest.mark.parametrize(
    ("headers", "body", "code", "more"),
    [
        ({"content-type": "text/plain"}, b"hello", "unsupported_media_type", {}),
        (
            {"content-type": "multipart/form-data; boundary=x"},
            b"--x\r\n",
            "unsupported_media_type",
            {},
        ),
        (
            {**JSON, "content-encoding": "gzip"},
            gzip.compress(json.dumps(COMPLETION).encode(), mtime=0),  # the same for every worker
            "unsupported_encoding",
            {"accept-encoding": "identity"},
        ),
    ],
)
async def test_bodies_sent_in_another_way(
    headers: dict[str, str], body: bytes, code: str, more: dict[str, str]
) -> None:
    async with frontend(answer) as running, http(running) as asks:
        reply = await asks.post("/v1/completions", content=body, headers=headers)
        assert error_of(reply) == (415, BAD, code, None)
        assert more.items() <= dict(reply.headers).items()
        plain = await asks.post(
            "/v1/completions", json=COMPLETION, headers={"content-encoding": "identity"}
        )
        assert plain.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allowed"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed", {"POST"}),
        ("PUT", "/v1/completions", 405, "method_not_allowed", {"POST"}),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed", {"POST"}),
        ("POST", "/v1/models", 405, "method_not_allowed", {"GET", "HEAD"}),
        ("POST", "/v1/responses/resp_1", 405, "method_not_allowed", {"DELETE", "GET", "HEAD"}),
        ("GET", "/v1/nothing", 404, "not_found", None),
        ("POST", "/v1/chat/completion", 404, "not_found", None),
        ("GET", "/", 404, "not_found", None),
    ],
)
async def test_paths_and_methods_that_are_not_there(
    method: str, path: str, status: int, code: str, allowed: set[str] | None
) -> None:
    async with frontend(answer) as running, http(running) as asks:
        reply = await asks.request(method, path, headers={"x-request-id": "mine"})
        assert error_of(reply)[:3:2] == (status, code)
        assert error_of(reply)[1] == ("not_found_error" if status == 404 else BAD)
        assert reply.headers["x-request-id"] == "mine"
        given = reply.headers.get("allow")
        assert (None if given is None else set(given.split(", "))) == allowed


async def test_probes_and_lists_answer_head() -> None:
    async with frontend(answer) as running, http(running) as asks:
        for path in ("/health", "/live", "/version", "/metrics", "/v1/models", "/docs"):
            head, got = await asks.head(path), await asks.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == got.headers["content-type"]
            assert got.content
            assert got.headers["x-request-id"]


async def test_health_says_which_models_are_served() -> None:
    async with frontend(answer) as running, http(running) as asks:
        reply = await asks.get("/health")
        ready = {"status": "ready", "engines": {MODEL: 1}, "routed_by_load": [MODEL]}
        assert (reply.status_code, reply.json()) == (200, ready)
        running.fleet.engines = []
        reply = await asks.get("/health")
        assert (reply.status_code, reply.json()["engines"]) == (503, {})
        assert "waits_for" in reply.json()
        assert (await asks.get("/live")).json() == {"status": "live"}


async def test_a_models_name_may_have_slashes_however_they_are_written() -> None:
    async with frontend(answer) as running, http(running) as asks:
        for path in ("/v1/models/test/model", "/v1/models/test%2Fmodel"):
            found = (await asks.get(path)).json()
            assert (found["id"], found["object"], found["max_model_len"]) == (MODEL, "model", 4096)
        missing = await asks.get("/v1/models/test/other")
        assert error_of(missing) == (404, "not_found_error", "model_not_found", "model")


async def test_ids_and_traces_go_on() -> None:
    async with frontend(answer) as running, http(running) as asks:
        headers = {"x-request-id": "mine", "traceparent": TRACE, "tracestate": "a=b"}
        reply = await asks.post("/v1/completions", json=COMPLETION, headers=headers)
        (asked,) = running.fleet.engines[0].asked
        assert reply.headers["x-request-id"] == asked.headers["x-request-id"] == "mine"
        assert asked.headers["traceparent"].split("-")[1] == TRACE.split("-")[1]
        assert asked.headers["traceparent"] != TRACE
        assert asked.headers["tracestate"] == "a=b"
        assert "gzip" not in asked.headers.get("accept-encoding", "")  # nobody here unpacks it
        odd = await asks.get("/health", headers={"x-request-id": "two words"})
        assert odd.headers["x-request-id"] != "two words"


async def test_keys() -> None:
    gate = Gate(("a-client",), **GUARDED)
    async with frontend(answer, gate=gate) as running, http(running) as asks:
        for path in ("/v1/models", "/v1/models/x", "/v1/responses/r", "/busy_threshold"):
            for headers, said in (({}, "No API key"), ({"x-api-key": "wrong"}, "Incorrect")):
                reply = await asks.get(path, headers=headers)
                kind = (401, "authentication_error", "invalid_api_key", None)
                assert error_of(reply) == kind
                assert said in reply.json()["error"]["message"]
                assert reply.headers["www-authenticate"] == "Bearer"
        for key in ("a-client", "the-admin"):
            for headers in ({"x-api-key": key}, {"authorization": f"bearer {key}"}):
                assert (await asks.get("/v1/models", headers=headers)).status_code == 200
        for path in ("/health", "/live", "/version", "/metrics", "/openapi.json", "/docs"):
            assert (await asks.get(path)).status_code == 200


async def test_the_clients_exceptions() -> None:
    gate = Gate(("a-client",), **GUARDED)
    async with frontend(answer, gate=gate) as running:
        async with client(running, api_key="a-client") as asking:
            with pytest.raises(openai.BadRequestError) as wrong:
                await asking.completions.create(model=MODEL, prompt=5)  # type: ignore[call-overload]
            assert (wrong.value.code, wrong.value.param) == ("invalid_value", "prompt")
            with pytest.raises(openai.APIStatusError) as large:
                await asking.completions.create(model=MODEL, prompt="x" * 2000)
            assert (large.value.status_code, large.value.code) == (413, "body_too_large")
        async with client(running, api_key="other") as asking:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await asking.models.list()
            assert unknown.value.code == "invalid_api_key"
        async with client(running, api_key="a-client", base_url=running.url) as asking:
            with pytest.raises(openai.PermissionDeniedError) as denied:
                await asking.get("/busy_threshold", cast_to=object)
            assert denied.value.code == "admin_only"


async def test_limits_are_for_admins() -> None:
    changed = {"model": MODEL, "active_decode_blocks_threshold": 0.85}
    as_the_reference_tells = {
        **changed,
        "active_prefill_tokens_threshold": None,
        "active_prefill_tokens_threshold_frac": None,
    }
    gate = Gate(("a-client",), **GUARDED)
    async with frontend(answer, gate=gate) as running, http(running) as asks:
        client_key, admin_key = {"x-api-key": "a-client"}, {"x-api-key": "the-admin"}
        for method in ("GET", "POST"):
            reply = await asks.request(method, "/busy_threshold", headers=client_key)
            assert error_of(reply) == (403, "permission_error", "admin_only", None)
        made = await asks.post("/busy_threshold", json=changed, headers=admin_key)
        assert made.json() == as_the_reference_tells
        told = await asks.get("/busy_threshold", headers=admin_key)
        assert told.json() == {"thresholds": [as_the_reference_tells]}
        for body, status in (({**changed, "active_decode_blocks_threshold": 2}, 400),):
            reply = await asks.post("/busy_threshold", json=body, headers=admin_key)
            assert error_of(reply)[0] == status
        reply = await asks.post("/busy_threshold", json={"model": "x"}, headers=admin_key)
        assert error_of(reply) == (404, "not_found_error", "model_not_found", "model")
        reply = await asks.post("/busy_threshold", json=LARGE, headers=admin_key)
        assert error_of(reply)[0] == 413


@pytest.mark.parametrize(("open_to_clients", "status"), [(False, 403), (True, 200)])
async def test_an_operator_may_allow_limits_to_all_clients(
    open_to_clients: bool, status: int
) -> None:
    gate = Gate((), 8, 1000, clients_are_admins=open_to_clients)
    async with frontend(answer, gate=gate) as running, http(running) as asks:
        assert (await asks.get("/busy_threshold")).status_code == status


async def test_pages_of_browsers_may_ask_where_that_is_set() -> None:
    page = {"origin": "https://app.example"}
    preflight = {**page, "access-control-request-method": "POST"}
    gate = Gate(("a-client",), **GUARDED)
    async with frontend(answer, gate=gate) as running, http(running) as asks:
        reply = await asks.get("/live", headers=page)
        assert "access-control-allow-origin" not in reply.headers
        assert (await asks.options("/v1/completions", headers=preflight)).status_code == 405
    given = ["https://app.example"]
    async with frontend(answer, gate=gate, cors_origins=given) as running, http(running) as asks:
        asked = {**preflight, "access-control-request-headers": "authorization, content-type"}
        reply = await asks.options("/v1/completions", headers=asked)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in reply.headers["access-control-allow-headers"]
        reply = await asks.post("/v1/completions", json=COMPLETION, headers=page)
        assert reply.status_code == 401  # the key is asked for all the same
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()
        other = await asks.get("/live", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_an_origin_that_no_browser_sends_is_refused() -> None:
    for origin in ("https://app.example/", "app.example", "https://app.example/page"):
        with pytest.raises(ValueError, match="an origin is"):
            OpenAiSettings(cors_origins=[origin])
    assert OpenAiSettings(cors_origins=["*", "http://localhost:3000"]).cors_origins


async def test_when_to_come_back_is_told() -> None:
    async with frontend() as running, http(running) as asks:
        reply = await asks.post("/v1/completions", json=COMPLETION)
        assert error_of(reply) == (503, "server_error", "overloaded", None)
        assert reply.headers["retry-after"] == "1"


async def test_a_fault_of_ours_is_told_as_one() -> None:
    async with frontend(answer) as running, http(running) as asks:
        running.fleet.models = None  # type: ignore[method-assign, assignment]
        reply = await asks.get("/v1/models")
        assert error_of(reply) == (500, "server_error", "internal", None)
