"""The routes that clients have, each once: what serves them is checked against this list.

`/openapi.json` and `/docs` are made of it, and the table of docs/FRONTEND.md is compared with it.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from frontend.relay import GENERATE, RESPONSES
from frontend.request import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    MessagesRequest,
    ModelRequest,
    ResponsesRequest,
)
from router.asks import BusyAsk

_COMPONENT: Final = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class ApiRoute:
    methods: tuple[str, ...]
    path: str
    what: str
    takes: type[msgspec.Struct] | None = None
    open: bool = False  # it takes no key

    @property
    def parameters(self) -> list[str]:
        """In its path."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


_POST: Final = ("POST",)
_GET: Final = ("GET",)

ROUTES: Final = (
    ApiRoute(_POST, "/v1/chat/completions", "An answer to a conversation.", ChatRequest),
    ApiRoute(_POST, "/v1/completions", "How a text goes on.", CompletionRequest),
    ApiRoute(_POST, RESPONSES, "OpenAI's newer interface.", ResponsesRequest),
    ApiRoute(("GET", "DELETE"), "/v1/responses/{response_id}", "One that an engine keeps."),
    ApiRoute(_POST, "/v1/responses/{response_id}/cancel", "End one in the background."),
    ApiRoute(_GET, "/v1/responses/{response_id}/input_items", "What it was made from."),
    ApiRoute(_POST, GENERATE, "Tokens in, tokens out, as vLLM has it.", GenerateRequest),
    ApiRoute(_POST, "/v1/messages", "Anthropic's interface.", MessagesRequest),
    ApiRoute(_POST, "/v1/messages/count_tokens", "How long a prompt would be.", ModelRequest),
    *(
        ApiRoute(_POST, path, "As the engine does it, routed by load.", ModelRequest)
        for path in (
            *("/v1/embeddings", "/v2/embed", "/v1/score", "/score", "/v1/rerank", "/v2/rerank"),
            *("/rerank", "/classify", "/pooling", "/tokenize", "/detokenize"),
            *("/v1/chat/completions/render", "/v1/completions/render"),
        )
    ),
    ApiRoute(_GET, "/v1/models", "Models that some engine serves now."),
    ApiRoute(_GET, "/v1/models/{name}", "One of them; names may have slashes."),
    ApiRoute(_GET, "/busy_threshold", "Limits above which engines are sent nothing."),
    ApiRoute(_POST, "/busy_threshold", "Change them, until the frontend ends.", BusyAsk),
    ApiRoute(_GET, "/health", "200 once some engine serves, else 503.", open=True),
    ApiRoute(_GET, "/live", "The process is there.", open=True),
    ApiRoute(_GET, "/version", "Of the frontend.", open=True),
    ApiRoute(_GET, "/metrics", "Prometheus's text format.", open=True),
    ApiRoute(_GET, "/openapi.json", "This list, for programs.", open=True),
    ApiRoute(_GET, "/docs", "This list, for people.", open=True),
)


def openapi(version: str) -> dict[str, Any]:
    """OpenAPI 3.1. Of bodies it has the fields that are checked here; the rest is the engine's."""
    taken = [route.takes for route in ROUTES if route.takes is not None]
    _, components = msgspec.json.schema_components(
        list(dict.fromkeys(taken)), ref_template=_COMPONENT
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        for method in route.methods:
            paths.setdefault(route.path, {})[method.lower()] = dict(_operation(route))
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvbm-frontend", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def docs_page(version: str) -> str:
    """HTML without scripts or anything from elsewhere."""
    rows = "\n".join(
        f"<tr><td>{' '.join(route.methods)}</td><td><code>{html.escape(route.path)}</code></td>"
        f"<td>{html.escape(route.what, quote=False)}</td></tr>"
        for route in ROUTES
    )
    return _PAGE.format(version=html.escape(version), rows=rows)


def _operation(route: ApiRoute) -> Iterator[tuple[str, Any]]:
    yield "summary", route.what
    if route.parameters:
        made = {"in": "path", "required": True, "schema": {"type": "string"}}
        yield "parameters", [{"name": name, **made} for name in route.parameters]
    if route.takes is not None:
        schema = {"$ref": _COMPONENT.format(name=route.takes.__name__)}
        content = {"application/json": {"schema": schema}}
        yield "requestBody", {"required": True, "content": content}
    error = {"application/json": {"schema": {"$ref": _COMPONENT.format(name="Error")}}}
    yield (
        "responses",
        {
            "200": {"description": "The answer."},
            "default": {"description": "An error.", "content": error},
        },
    )
    if not route.open:
        yield "security", [{}, {"key": []}]


_TEXT_OR_NULL: Final = {"type": ["string", "null"]}
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}

_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>kvbm-frontend</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
td, th {{ text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; }}
</style>
<h1>kvbm-frontend {version}</h1>
<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>
<table>
<tr><th>method<th>path<th>what</tr>
{rows}
</table>
</html>
"""
