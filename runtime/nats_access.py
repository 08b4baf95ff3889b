"""How NATS is reached, as the settings of either plane say."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from runtime.tls import TlsSettings
from runtime.units import Secret


class NatsAccess(Protocol):
    """The part of a plane's settings that says how its NATS is reached."""

    @property
    def nats_urls(self) -> list[str]: ...
    @property
    def nats_user(self) -> str | None: ...
    @property
    def nats_password(self) -> Secret | None: ...
    @property
    def nats_credentials(self) -> Path | None: ...
    @property
    def tls(self) -> TlsSettings | None: ...


def check_access(access: NatsAccess) -> None:
    """Raises ValueError."""
    if (access.nats_user is None) != (access.nats_password is None):
        raise ValueError("nats_user and nats_password go together: give both or neither")
    if access.nats_credentials is not None and access.nats_user is not None:
        raise ValueError("give nats_credentials or nats_user with nats_password, not both")
    for url in access.nats_urls:
        if not url.startswith(("nats://", "tls://", "ws://", "wss://")):
            raise ValueError(f"nats_url: {url!r} is no NATS URL; accepted: nats://HOST:PORT")
