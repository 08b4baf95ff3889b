"""Where samples come from: programs' own pages, or a Prometheus server that reads them.

An answer that is late, too long or makes no sense is an `Unread` with the reason, never an error:
the planner goes on with what it has.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

import httpx2
import msgspec

from planner.pages import NAMES, Sample, samples
from planner.settings import PrometheusSettings

PAGE_BYTES_MAX: Final = 16 << 20
AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class Unread:
    reason: str


Read = list[Sample] | Unread


class Source(Protocol):
    """All calls from one event loop."""

    async def read(self, urls: Iterable[str]) -> dict[str, Read]:
        """What the programs at these URLs (http://HOST:PORT) tell."""
        ...

    async def close(self) -> None: ...


class Pages:
    """Each program's `/metrics`, all at once."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._client = _client(None)
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def read(self, urls: Iterable[str]) -> dict[str, Read]:
        wanted = list(dict.fromkeys(urls))
        found = await asyncio.gather(*(self._page(url) for url in wanted))
        return dict(zip(wanted, found, strict=True))

    async def close(self) -> None:
        await self._client.aclose()

    async def _page(self, url: str) -> Read:
        async with self._gate:
            answer = await _ask(self._client, f"{url.rstrip('/')}/metrics", {}, self._timeout_s)
        if isinstance(answer, Unread):
            return answer
        return samples(answer.decode(errors="replace"))


class _Result(msgspec.Struct):
    metric: dict[str, str]
    value: tuple[float, str]


class _Data(msgspec.Struct):
    resultType: str  # noqa: N815 (Prometheus's)
    result: list[_Result]


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    error: str = ""


class Prometheus:
    """One instant query for all names; a program is known by its `instance` label, HOST:PORT.

    https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries
    """

    def __init__(self, settings: PrometheusSettings) -> None:
        """Raises OSError if the CA's file cannot be read."""
        self._settings = settings
        self._url = settings.url.rstrip("/")
        context = None
        if settings.ca is not None:
            context = ssl.create_default_context(cafile=settings.ca)
        token = settings.token
        headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}
        self._client = _client(context, headers)
        names = "|".join(NAMES)
        matchers = [f'__name__=~"{names}"', *([settings.selector] if settings.selector else [])]
        self._query = f"{{{','.join(matchers)}}}"

    async def read(self, urls: Iterable[str]) -> dict[str, Read]:
        wanted = list(dict.fromkeys(urls))
        answer = await _ask(
            self._client,
            f"{self._url}/api/v1/query",
            {"query": self._query},
            self._settings.timeout,
        )
        by_instance = answer if isinstance(answer, Unread) else _by_instance(answer)
        if isinstance(by_instance, Unread):
            return dict.fromkeys(wanted, by_instance)
        found: dict[str, Read] = {}
        for url in wanted:
            instance = urlsplit(url).netloc
            told = by_instance.get(instance)
            found[url] = Unread(f"Prometheus has no instance {instance}") if told is None else told
        return found

    async def close(self) -> None:
        await self._client.aclose()


def _by_instance(content: bytes) -> Mapping[str, list[Sample]] | Unread:
    try:
        answer = msgspec.json.decode(content, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Unread(f"Prometheus's answer makes no sense: {error}")
    if answer.status != "success" or answer.data is None:
        return Unread(f"Prometheus: {answer.error or answer.status}")
    if answer.data.resultType != "vector":
        return Unread(f"Prometheus answered with a {answer.data.resultType}, not a vector")
    found: defaultdict[str, list[Sample]] = defaultdict(list)
    for one in answer.data.result:
        labels = one.metric
        try:
            number = float(one.value[1])
        except ValueError:
            continue
        name, instance = labels.get("__name__", ""), labels.get("instance", "")
        found[instance].append(Sample(name, labels, number))
    return found


def _client(
    context: ssl.SSLContext | None, headers: Mapping[str, str] | None = None
) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        timeout=None,  # `_ask` bounds the whole of it
        verify=True if context is None else context,
        trust_env=False,
        headers=dict(headers or {}),
    )


async def _ask(
    client: httpx2.AsyncClient, url: str, query: Mapping[str, str], timeout_s: float
) -> bytes | Unread:
    content = bytearray()
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream("GET", url, params=dict(query)) as response,
        ):
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > PAGE_BYTES_MAX:
                    return Unread(f"{url} answered more than {PAGE_BYTES_MAX} bytes")
    except TimeoutError:
        return Unread(f"{url} was not answered within {timeout_s:g} s")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return Unread(f"{url}: {str(error) or type(error).__name__}")
    if response.status_code != httpx2.codes.OK:
        said = bytes(content[:200]).decode(errors="replace")
        return Unread(f"{url} answered with status {response.status_code} {said}".strip())
    return bytes(content)
