"""An engine's OpenAI server as its watcher asks it: is it well, what does it serve, how busy is it.

Answers are outcomes, never errors: a server that is away, slow, or answers nonsense is a `Bad`
with the reason. What the metrics are called is vLLM's.
"""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import dataclass
from typing import Final

import httpx2
import msgspec

BODY_BYTES_MAX: Final = 16 << 20
CANARY_PROMPT: Final = "1"
# A model that completes nothing, such as one of embeddings.
_NOT_OFFERED: Final = frozenset({400, 404, 405, 501})

_SAMPLE = re.compile(r"^(vllm:\w+)\{([^\n]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_TOKENS: Final = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
_CACHE: Final = "vllm:cache_config_info"
_ASKED: Final = frozenset({_RUNNING, _WAITING, *_TOKENS, _CACHE})


@dataclass(frozen=True, slots=True)
class Bad:
    """No answer of use; `away`: nobody listens there."""

    reason: str
    away: bool = False


@dataclass(frozen=True, slots=True)
class Well:
    """It answered, and says that it can work."""


@dataclass(frozen=True, slots=True)
class Served:
    model: str
    context_tokens: int  # 0: not told
    root: str = ""  # the model's folder or its name at a hub, as the server was given it


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all ranks together, but the cache, which is each rank's."""

    requests: int  # in flight: running and waiting
    tokens: float  # computed since its start
    ranks: int  # 0: not told
    block_tokens: int
    kv_blocks: int


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    root: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class OpenAiServer:
    """`url` is without /v1. All calls from one event loop; `close` it."""

    def __init__(
        self, url: str, timeout_s: float, *, api_key: str | None = None, verify: bool = True
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            timeout=None,  # `_ask` bounds the whole of it
            verify=verify,
            # A proxy for the world outside is none for an engine.
            trust_env=False,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        )

    async def health(self) -> Well | Bad:
        answer = await self._ask("GET", "/health")
        return answer if isinstance(answer, Bad) else Well()

    async def served(self) -> Served | Bad:
        """The first model that it lists: adapters come behind what they adapt."""
        answer = await self._ask("GET", "/v1/models")
        if isinstance(answer, Bad):
            return answer
        try:
            models = msgspec.json.decode(answer, type=_Models).data
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return Bad(f"/v1/models is no list of models: {error}")
        if not models:
            return Bad("/v1/models lists no model")
        first = models[0]
        return Served(first.id, max(first.max_model_len or 0, 0), first.root or "")

    async def figures(self) -> Figures | Bad:
        answer = await self._ask("GET", "/metrics")
        return answer if isinstance(answer, Bad) else read_figures(answer.decode(errors="replace"))

    async def one_token(self, model: str, timeout_s: float) -> Well | Bad:
        """Have it compute one. A server without completions is as well as it says it is."""
        body = {"model": model, "prompt": CANARY_PROMPT, "max_tokens": 1, "temperature": 0}
        answer = await self._ask("POST", "/v1/completions", body, timeout_s)
        return answer if isinstance(answer, Bad) else Well()

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout_s: float | None = None,
    ) -> bytes | Bad:
        limit_s = timeout_s or self._timeout_s
        try:
            async with (
                asyncio.timeout(limit_s),
                self._client.stream(method, path, json=body) as response,
            ):
                content = bytearray()
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > BODY_BYTES_MAX:
                        return Bad(f"{path} answered more than {BODY_BYTES_MAX} bytes")
        except httpx2.ConnectError as error:
            return Bad(f"nobody listens at {self.url}: {error}", away=True)
        except TimeoutError:
            return Bad(f"{path} was not answered within {limit_s:g} s")
        except httpx2.HTTPError as error:
            return Bad(f"{path}: {str(error) or type(error).__name__}")
        if body is not None and response.status_code in _NOT_OFFERED:
            return b""
        if response.status_code != httpx2.codes.OK:
            said = bytes(content[:200]).decode(errors="replace")
            return Bad(f"{path} answered with status {response.status_code} {said}".strip())
        return bytes(content)


def read_figures(page: str) -> Figures:
    """Of a page of metrics; what it does not tell is 0."""
    busy = tokens = 0.0
    cache: dict[str, str] = {}
    ranks: set[str] = set()
    for name, labels, value in _SAMPLE.findall(page):
        if name not in _ASKED:
            continue
        told = dict(_LABEL.findall(labels))
        if "engine" in told:
            ranks.add(told["engine"])
        if name == _CACHE:
            cache = told
        elif name in _TOKENS:
            tokens += _number(value)
        else:
            busy += _number(value)
    return Figures(
        requests=round(busy),
        tokens=tokens,
        ranks=len(ranks),
        block_tokens=int(_number(cache.get("block_size", "0"))),
        kv_blocks=int(_number(cache.get("num_gpu_blocks", "0"))),
    )


def _number(text: str) -> float:
    """0 for what is none, such as None."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
