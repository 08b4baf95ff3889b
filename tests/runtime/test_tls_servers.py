"""NATS and etcd over TLS, with real servers and certificates made here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from structlog.testing import capture_logs

from runtime.discovery import DiscoverySettings, create_discovery
from runtime.embedded import EmbeddedNats
from runtime.embedded_etcd import EmbeddedEtcd
from runtime.events import EventPlane, EventPlaneSettings, create_event_plane
from runtime.requests import RequestPlaneSettings, create_request_plane
from runtime.requests.errors import RequestError
from runtime.tls import TlsSettings
from tests.runtime.certificates import Files, make_files
from tests.runtime.planes import WAIT_S, nats_settings, take, until
from tests.runtime.requests.handlers import Handlers


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("tls"))


def of_server(files: Files, *, mutual: bool = False) -> TlsSettings:
    certificate, key = files.server
    return TlsSettings(certificate=certificate, key=key, authority=files.authority, mutual=mutual)


def of_client(files: Files) -> TlsSettings:
    certificate, key = files.client
    return TlsSettings(certificate=certificate, key=key, authority=files.authority)


def of_stranger(files: Files) -> TlsSettings:
    certificate, key = files.stranger
    return TlsSettings(certificate=certificate, key=key, authority=files.authority)


@pytest.fixture(scope="module")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(tmp_path_factory.mktemp("nats"), tls=of_server(files)) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    tls = of_server(files, mutual=True)
    with EmbeddedNats(tmp_path_factory.mktemp("nats"), tls=tls) as server:
        yield server


def event_settings(server: EmbeddedNats, **other: Any) -> EventPlaneSettings:
    return nats_settings(server).model_copy(update=other)


async def works(plane: EventPlane) -> bool:
    subscription = plane.subscribe("s")
    await asyncio.wait_for(subscription.active.wait(), WAIT_S)
    plane.publish("s", b"secret")
    return await take(subscription, 1) == [b"secret"]


async def refusal(settings: EventPlaneSettings) -> str:
    """Why an event plane does not connect."""
    plane = create_event_plane(settings, "test")
    await plane.start()
    await until(lambda: plane.status().error not in {None, "not connected yet"})
    assert not plane.status().connected
    reason = str(plane.status().error)
    await plane.close()
    return reason


# -- NATS, the event plane ----------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_events_go_over_tls(server: EmbeddedNats, files: Files, scheme: str) -> None:
    """The server asks for it, whatever the URL says."""
    url = f"{scheme}://127.0.0.1:{server.port}"
    tls = TlsSettings(authority=files.authority)
    plane = create_event_plane(event_settings(server, nats_url=url, tls=tls), "test")
    await plane.start()
    assert await works(plane)
    await plane.close()


async def test_a_server_of_another_authority_is_refused(server: EmbeddedNats, files: Files) -> None:
    other = TlsSettings(authority=files.other_authority)
    assert "certificate verify failed" in await refusal(event_settings(server, tls=other))
    # Without any: the system's authorities do not know it either.
    assert "certificate verify failed" in await refusal(event_settings(server))


async def test_a_server_of_another_name_is_refused(server: EmbeddedNats, files: Files) -> None:
    tls = TlsSettings(authority=files.authority, server_name="another.example")
    assert "another.example" in await refusal(event_settings(server, tls=tls))


async def test_a_client_with_a_certificate_is_let_in_and_others_are_not(
    mutual: EmbeddedNats, files: Files
) -> None:
    plane = create_event_plane(event_settings(mutual, tls=of_client(files)), "test")
    await plane.start()
    assert await works(plane)
    await plane.close()
    without = TlsSettings(authority=files.authority)
    for tls in (without, of_stranger(files)):
        assert await refusal(event_settings(mutual, tls=tls))


@pytest.mark.parametrize("by_url", [True, False])
async def test_credentials_are_not_told_to_a_server_without_tls(files: Files, by_url: bool) -> None:
    """Whoever stands between could otherwise just say that there is none."""
    heard = bytearray()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576}\r\n')
        heard.extend(await reader.read(65536))
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as liar:
        port = liar.sockets[0].getsockname()[1]
        settings = EventPlaneSettings(
            plane="nats",
            nats_url=f"{'tls' if by_url else 'nats'}://127.0.0.1:{port}",
            nats_user="kvbm",
            nats_password=SecretStr("the password"),
            tls=None if by_url else TlsSettings(authority=files.authority),
        )
        assert "offers no TLS" in await refusal(settings)
    assert not heard


async def test_files_that_cannot_be_used_are_named(server: EmbeddedNats, tmp_path: Path) -> None:
    tls = TlsSettings(authority=tmp_path / "absent.pem")
    assert "absent.pem" in await refusal(event_settings(server, tls=tls))


# -- NATS, the request plane --------------------------------------------------------------


async def ask(server: EmbeddedNats, server_tls: TlsSettings, client_tls: TlsSettings) -> bytes:
    options: dict[str, Any] = {
        "plane": "nats",
        "nats_url": server.url,
        "nats_user": server.user,
        "nats_password": SecretStr(server.password),
    }
    serving = create_request_plane(RequestPlaneSettings(**options, tls=server_tls), "s").server()
    client = create_request_plane(RequestPlaneSettings(**options, tls=client_tls), "c").client()
    Handlers().serve(serving)
    try:
        address = await serving.start()
        async with client.stream(address, "test.echo.once", b"x", deadline_s=WAIT_S) as stream:
            return await anext(stream)
    finally:
        await client.close()
        await serving.close()


async def test_requests_go_over_tls(mutual: EmbeddedNats, files: Files) -> None:
    assert await ask(mutual, of_client(files), of_client(files)) == b"x"


async def test_neither_side_of_a_request_talks_to_a_server_it_does_not_trust(
    server: EmbeddedNats, files: Files
) -> None:
    trusting, wary = (
        TlsSettings(authority=authority) for authority in (files.authority, files.other_authority)
    )
    with pytest.raises(RequestError, match="certificate verify failed"):
        await ask(server, trusting, wary)
    # Who serves waits for a NATS that it trusts, and says so.
    with capture_logs() as logged, pytest.raises(RequestError, match="nobody listens there"):
        await ask(server, wary, trusting)
    [waits] = [line for line in logged if line["event"] == "request_plane_waits"]
    assert "certificate verify failed" in waits["reason"]


# -- etcd ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def etcd(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    tls = of_server(files, mutual=True)
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd"), tls=tls) as server:
        yield server


def etcd_settings(server: EmbeddedEtcd, authority: Path | None, **other: Any) -> DiscoverySettings:
    return DiscoverySettings(
        discovery="etcd", ttl=2.0, etcd_url=server.url, etcd_ca=authority, **other
    )


async def test_etcd_knows_a_client_by_its_certificate(etcd: EmbeddedEtcd, files: Files) -> None:
    certificate, key = files.client
    settings = etcd_settings(etcd, files.authority, etcd_certificate=certificate, etcd_key=key)
    discovery = create_discovery(settings, {})
    await discovery.start()
    async with discovery.watch("a/") as watch, asyncio.timeout(WAIT_S):
        await discovery.put("a/b", b"value")
        assert [type(await anext(watch)).__name__ for _ in range(2)].count("Put") == 1
        assert await discovery.list("a/") == {"a/b": b"value"}
    await discovery.close()


@pytest.mark.parametrize("wrong", ["other authority", "no authority", "no certificate", "stranger"])
async def test_etcd_and_its_clients_refuse_those_they_do_not_trust(
    etcd: EmbeddedEtcd, files: Files, wrong: str
) -> None:
    certificate, key = files.stranger if wrong == "stranger" else files.client
    own: dict[str, Any] = {"etcd_certificate": certificate, "etcd_key": key}
    authority: Path | None = files.authority
    if wrong == "other authority":
        authority = files.other_authority
    elif wrong == "no authority":
        authority = None
    elif wrong == "no certificate":
        own = {}
    discovery = create_discovery(etcd_settings(etcd, authority, **own), {})
    await discovery.start()
    await until(lambda: discovery.status().error not in {None, "not connected yet"})
    error = str(discovery.status().error)
    assert etcd.url in error
    assert ("certificate verify failed" in error) == ("authority" in wrong), error
    assert not discovery.status().connected
    await discovery.close()


def test_a_certificate_of_etcd_needs_its_key() -> None:
    with pytest.raises(ValidationError, match="etcd_certificate and etcd_key go together"):
        DiscoverySettings(discovery="etcd", etcd_certificate=Path("c.pem"))
