"""The frontend as its operators run it: a process that finds engines and routes on tokens."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from runtime.discovery import DiscoverySettings, create_discovery
from runtime.engine_card import COMPONENT, ENDPOINT, EngineCard
from runtime.generation import Generate
from runtime.instances import Registration
from runtime.lifecycle import Lifecycle, State
from runtime.names import EndpointName, InstanceName
from runtime.requests import RequestPlaneSettings, create_request_plane
from runtime.server_process import free_ports
from tests.frontend.token_engines import TokenEngine
from tests.models import tiny_llama
from tests.plain_http import PLAIN
from tests.runtime.engines.scripted import Asked, Engine, Wire

WAIT_S = 240.0  # a fresh checkout compiles its kernels first
ROOT = Path(__file__).parents[2]
MODEL = "tiny"
COMPLETION = {"model": MODEL, "prompt": "the quick brown fox " * 20, "max_tokens": 4}


async def answer(wire: Wire, asked: Asked) -> None:
    wire.whole(b'{"object":"text_completion"}')


async def slow_stream(wire: Wire, asked: Asked) -> None:
    wire.begin()
    for n in range(20):
        wire.part(b'data: {"n":%d}\n\n' % n)
        await asyncio.sleep(0.1)
    wire.part(b"data: [DONE]\n\n")
    wire.end()


class Site:
    """Engines in a directory, and one frontend that looks there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = DiscoverySettings(file_directory=folder / "found", file_poll=0.05)
        self.discovery = create_discovery(found, {})
        self.log = folder / "frontend.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.engines: list[Engine] = []
        self.scheme = "http"
        self._verify: Any = True

    async def add(self, instance: int, url: str, transport: str = "", path: str = "") -> None:
        card = EngineCard(model=MODEL, url=url, block_tokens=16, context_tokens=4096, path=path)
        name = InstanceName(EndpointName("default", COMPONENT, ENDPOINT), instance)
        made = Registration(
            self.discovery, name, Lifecycle(), transport or url, labels=card.labels()
        )
        await made.register()
        await made.move(State.RUNNING)

    async def add_engine(self, instance: int, script: Any) -> Engine:
        engine = Engine(instance, script)
        await engine.start()
        self.engines.append(engine)
        await self.add(instance, engine.url)
        return engine

    def start(self, **settings: Any) -> None:
        port, operators = free_ports(2)
        given = {
            "openai.port": port,
            "http.port": operators,
            "discovery.file_directory": self.folder / "found",
            "discovery.file_poll": "50ms",
            "index.capacity": 10_000,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        command = [sys.executable, "-m", "frontend", "serve"]
        for key, value in given.items():
            command += ["--set", f"{key}={value}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
        self.url = f"{self.scheme}://127.0.0.1:{port}"
        self.operators = f"http://127.0.0.1:{operators}"

    def client(self, **given: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=30.0, verify=self._verify, **given)

    async def ready(self, engines: int = 1, *, tokens: bool = False) -> None:
        """`tokens`: and the model's tokenizer is read."""
        async with self.client() as http:
            try:
                async with asyncio.timeout(WAIT_S):
                    while not await self._has(http, engines, tokens):
                        await asyncio.sleep(0.05)
            except TimeoutError:
                pytest.fail(f"not ready\n{self.log.read_text()}")

    async def _has(self, http: httpx.AsyncClient, engines: int, tokens: bool) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            found = (await http.get("/health")).json()
        except httpx.TransportError:
            return False
        return found["engines"] == {MODEL: engines} and not (tokens and found["routed_by_load"])

    def trust(self, certificate: Path) -> None:
        self.scheme = "https"
        self._verify = ssl.create_default_context(cafile=certificate)

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, WAIT_S)


@asynccontextmanager
async def a_site(folder: Path) -> AsyncIterator[Site]:
    site = Site(folder)
    await site.discovery.start()
    try:
        yield site
    finally:
        if site.process is not None:
            await site.end(signal.SIGKILL)
        for engine in site.engines:
            await engine.stop()
        await site.discovery.close()


async def test_requests_of_one_beginning_go_to_one_engine(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    async with a_site(tmp_path) as site:
        engines = [await site.add_engine(number, answer) for number in (1, 2)]
        paths = json.dumps({MODEL: str(model)})
        site.start(
            model_paths=paths, index__source="routes", openai__admin_keys="the-admin,another-admin"
        )
        await site.ready(2, tokens=True)
        async with site.client() as http:
            for _ in range(6):
                reply = await http.post("/v1/completions", json=COMPLETION)
                assert reply.status_code == 200
            first = reply.headers["x-kvbm-worker"]
            assert int(reply.headers["x-kvbm-cached-tokens"]) > 300
            metrics = (await http.get("/metrics")).text
            limits = {"model": MODEL, "active_prefill_tokens_threshold": 100}
            assert (await http.post("/busy_threshold", json=limits)).status_code == 403
            admin = {"x-api-key": "the-admin"}
            reply = await http.post("/busy_threshold", json=limits, headers=admin)
            assert limits.items() <= reply.json().items()
            wrong = {"active_decode_blocks_threshold": 7}
            reply = await http.post("/busy_threshold", json=wrong, headers=admin)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_value")
            reply = await http.post("/busy_threshold", json={"model": "x"}, headers=admin)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        asked = sorted(len(engine.asked) for engine in engines)
        assert asked == [0, 6], first
        assert 'kvbm_frontend_requests_total{model="tiny",outcome="success"' in metrics
        async with httpx.AsyncClient(base_url=site.operators, verify=PLAIN) as operators:
            told = (await operators.get("/v1/workers")).json()
            assert len(told["models"][0]["workers"]) == 2
            told = (await operators.get("/v1/busy_threshold")).json()
            assert told["models"][0]["prefill_tokens"] == 100
        assert await site.end() == 0


async def test_what_is_under_way_is_finished_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whose tokens are not known here: it is passed through all the same.
    monkeypatch.setenv("KVBM_FRONTEND_TOKENS_FOR", json.dumps([MODEL]))
    async with a_site(tmp_path) as site:
        await site.add_engine(1, slow_stream)
        site.start(index__source="routes")
        await site.ready()
        async with site.client() as http:
            body = {**COMPLETION, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                events = aiter(reply.aiter_lines())
                assert await anext(events)
                assert site.process is not None
                site.process.send_signal(signal.SIGTERM)
                lines = [line async for line in events if line]
            assert lines[-1] == "data: [DONE]"
            assert len(lines) == 20
        assert await site.end() == 0


async def test_engines_that_take_tokens(tmp_path: Path) -> None:
    """Their folder says how: no setting names it."""
    model = tiny_llama(tmp_path / "model")
    plane = create_request_plane(RequestPlaneSettings(), "test")
    engine = Letters()
    server = plane.server()
    server.serve(f"default.{COMPONENT}.{ENDPOINT}", engine.generate)
    address = await server.start()
    async with a_site(tmp_path) as site:
        await site.add(1, "", address, str(model))
        site.start(index__source="routes")
        await site.ready()
        async with site.client() as http:
            async with asyncio.timeout(WAIT_S):
                while (await http.post("/v1/completions", json=COMPLETION)).status_code != 200:
                    await asyncio.sleep(0.1)
            reply = await http.post("/v1/completions", json=COMPLETION)
            assert reply.json()["choices"][0]["text"] == "abcd"
        assert await site.end() == 0
    await server.close()


class Letters(TokenEngine):
    """Says the alphabet, in a model whose tokens are bytes."""

    def __init__(self) -> None:
        super().__init__(1, "")

    async def generate(self, payload: bytes, context: Any) -> AsyncIterator[bytes]:
        from runtime.generation import Generated, decode_generate, encode
        from tests.models import VOCABULARY

        request: Generate = decode_generate(payload)
        letters = [VOCABULARY.index(letter) for letter in "abcdefgh"]
        tokens = letters[: request.sampling.max_tokens]
        yield encode(Generated(token_ids=tokens, finish_reason="length"))


async def test_clients_speak_tls(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    async with a_site(tmp_path) as site:
        await site.add_engine(1, answer)
        site.trust(certificate)
        site.start(openai__tls_cert=certificate, openai__tls_key=key, index__source="routes")
        await site.ready()
        async with site.client() as http:
            assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200
        assert await site.end() == 0


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"openai__port": "no"}, 2, "openai.port"),
        ({"openai__tls_cert": "/nowhere/a.pem"}, 2, "tls_key"),
        ({"openai__tls_cert": "nowhere.pem", "openai__tls_key": "nowhere.pem"}, 1, "TLS files"),
    ],
)
async def test_settings_that_cannot_be_used(
    tmp_path: Path, settings: dict[str, Any], status: int, said: str
) -> None:
    async with a_site(tmp_path) as site:
        site.start(**settings)
        assert site.process is not None
        assert await asyncio.to_thread(site.process.wait, WAIT_S) == status
        assert said in site.log.read_text()


async def test_keys_come_from_a_file_and_are_checked(tmp_path: Path) -> None:
    config = tmp_path / "frontend.yaml"
    check = [sys.executable, "-m", "frontend", "check-config", str(config)]
    for keys, status, said in [("[short]", 2, "8 characters"), ("[long-enough]", 0, "usable")]:
        config.write_text(f"openai: {{api_keys: {keys}}}\n")
        done = await asyncio.to_thread(
            subprocess.run, check, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == status
        assert said in done.stdout + done.stderr
        assert "short" not in done.stderr


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for loopback, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate, private
