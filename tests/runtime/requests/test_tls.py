"""TLS and mutual TLS, over TCP and HTTP, with certificates made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.requests import RequestPlaneSettings, create_request_plane
from runtime.requests.errors import ConnectionLost
from runtime.tls import TlsSettings
from tests.runtime.certificates import Files, make_files
from tests.runtime.requests.handlers import WAIT_S, Handlers


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("tls"))


async def ask(kind: str, server_tls: TlsSettings, client_tls: TlsSettings | None) -> bytes:
    """Serve and ask once; what came back."""
    server_settings = RequestPlaneSettings(plane=kind, tls=server_tls)  # type: ignore[arg-type]
    client_settings = RequestPlaneSettings(plane=kind, tls=client_tls)  # type: ignore[arg-type]
    server = create_request_plane(server_settings, "test").server()
    client = create_request_plane(client_settings, "test").client()
    Handlers().serve(server)
    address = await server.start()
    try:
        async with client.stream(address, "test.echo.once", b"x", deadline_s=WAIT_S) as stream:
            return await anext(stream)
    finally:
        await client.close()
        await server.close()


def of_server(files: Files, *, mutual: bool = False) -> TlsSettings:
    certificate, key = files.server
    return TlsSettings(certificate=certificate, key=key, authority=files.authority, mutual=mutual)


kinds = pytest.mark.parametrize("kind", ["tcp", "http"])


@kinds
async def test_a_client_that_trusts_the_authority_is_served(kind: str, files: Files) -> None:
    client = TlsSettings(authority=files.authority)
    assert await ask(kind, of_server(files), client) == b"x"


@kinds
async def test_a_server_of_another_authority_is_refused_before_anything_is_sent(
    kind: str, files: Files
) -> None:
    with pytest.raises(ConnectionLost, match=r"(?i)certificate verify failed") as caught:
        await ask(kind, of_server(files), TlsSettings(authority=files.other_authority))
    assert caught.value.may_retry


@kinds
async def test_a_server_of_another_name_is_refused(kind: str, files: Files) -> None:
    client = TlsSettings(authority=files.authority, server_name="another.example")
    with pytest.raises(ConnectionLost, match=r"(?i)certificate verify failed|mismatch"):
        await ask(kind, of_server(files), client)


@kinds
async def test_mutual_tls_serves_those_with_a_certificate(kind: str, files: Files) -> None:
    certificate, key = files.client
    client = TlsSettings(certificate=certificate, key=key, authority=files.authority)
    assert await ask(kind, of_server(files, mutual=True), client) == b"x"


@kinds
async def test_mutual_tls_refuses_those_without_one(kind: str, files: Files) -> None:
    with pytest.raises(ConnectionLost):
        await ask(kind, of_server(files, mutual=True), TlsSettings(authority=files.authority))


@kinds
async def test_mutual_tls_refuses_strangers(kind: str, files: Files) -> None:
    certificate, key = files.stranger
    client = TlsSettings(certificate=certificate, key=key, authority=files.authority)
    with pytest.raises(ConnectionLost):
        await ask(kind, of_server(files, mutual=True), client)


async def test_a_client_without_tls_gets_nowhere_at_a_server_with_it(files: Files) -> None:
    with pytest.raises(ConnectionLost):
        await ask("tcp", of_server(files), None)


async def test_files_that_cannot_be_used_are_named(files: Files, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    tls = TlsSettings(authority=tmp_path / "empty")
    with pytest.raises(OSError, match="empty"):
        await ask("tcp", tls, None)
    with pytest.raises(OSError, match="needs a certificate"):
        await ask("tcp", TlsSettings(authority=files.authority), None)


@pytest.mark.parametrize("wrong", [{"certificate": "c.pem"}, {"key": "k.pem"}, {"mutual": True}])
def test_settings_of_tls_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"go together|authority"):
        TlsSettings(**wrong)  # type: ignore[arg-type]
