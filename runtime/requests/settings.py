"""Which request plane a program uses, as part of its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from runtime.nats_access import check_access
from runtime.settings import Section
from runtime.tls import TlsSettings
from runtime.units import Duration, Secret, Size


class RequestPlaneSettings(Section):
    plane: Literal["tcp", "nats", "http", "memory"] = Field(
        default="tcp",
        description="How requests travel: `tcp` directly, `nats` through its servers, `http` "
        "where only that passes, `memory` within one process (tests).",
    )
    host: str = Field(default="127.0.0.1", description="Where a tcp or http server listens.")
    port: int = Field(
        default=0, ge=0, le=65535, description="Port of a tcp or http server; 0 takes a free one."
    )
    advertise_host: str | None = Field(
        default=None,
        description="The host others reach this server by; needed where `host` is 0.0.0.0.",
    )
    tls: TlsSettings | None = Field(
        default=None, description="TLS for tcp and http, and for NATS's own connection."
    )
    nats_url: str = Field(
        default="nats://127.0.0.1:4222",
        description="NATS server, or several separated by commas; `tls://` for TLS.",
    )
    nats_user: str | None = Field(default=None, description="User name for NATS.")
    nats_password: Secret | None = Field(
        default=None, description="Password for NATS, or `file:PATH` to read it from a file."
    )
    nats_credentials: Path | None = Field(
        default=None,
        description="NATS credentials file (JWT and key), instead of user and password.",
    )
    namespace: str = Field(
        default="default",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Part of the subjects of NATS.",
    )
    frame_max: Size = Field(
        default=32 << 20,
        ge=4096,
        le=1 << 30,
        description="The largest request or response, with its headers.",
    )
    window: Size = Field(
        default=256 << 10,
        ge=4096,
        description="What a stream may hold at the client before the handler must wait.",
    )
    in_flight_max: int = Field(
        default=1024,
        ge=1,
        description="Requests that a server, and streams that a client, may have at a time.",
    )
    in_flight_bytes_max: Size = Field(
        default=512 << 20, ge=1, description="Bytes of requests that a server may hold at a time."
    )
    connections_max: int = Field(
        default=1024, ge=1, description="Clients that may be connected to a server at a time."
    )
    timeout_max: Duration = Field(
        default=3600.0, gt=0, description="The deadline of requests that have none or a later one."
    )
    connect_timeout: Duration = Field(
        default=3.0, gt=0, description="How long a connection may take to be made."
    )
    ping_interval: Duration = Field(
        default=5.0, gt=0, description="How often each side asks whether the other is there."
    )
    silence_max: Duration = Field(
        default=15.0, gt=0, description="A peer that says nothing for this long is gone."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.silence_max < 2 * self.ping_interval:
            raise ValueError("silence_max must be at least twice ping_interval")
        check_access(self)
        return self

    @property
    def nats_urls(self) -> list[str]:
        return [url.strip() for url in self.nats_url.split(",")]
