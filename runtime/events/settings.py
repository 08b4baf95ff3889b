"""Which event plane a program uses, as part of its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from runtime.hosts import is_loopback
from runtime.nats_access import check_access
from runtime.settings import Section
from runtime.tls import TlsSettings
from runtime.units import Duration, Secret, Size


class EventPlaneSettings(Section):
    plane: Literal["nats", "zmq", "memory", "none"] = Field(
        default="none",
        description="How events leave the process: `nats` for a fleet, `zmq` for one without a "
        "broker, `memory` within one process (tests), `none` for a node alone.",
    )
    namespace: str = Field(
        default="default",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Programs of one deployment share it; part of every subject.",
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
    nats_embedded: bool = Field(
        default=False,
        description="The daemon starts the NATS server itself, out of the package "
        "`kvbm-daemon[embedded]`, for programs on this machine: `nats_url` is then a loopback "
        "address with a port, and `nats_user` and `nats_password` are what it asks for.",
    )
    nats_durable: bool = Field(
        default=False,
        description="Block events are kept in a stream of JetStream too, so that a router that was "
        "away for long reads what it missed. The server must have JetStream enabled.",
    )
    nats_durable_age: Duration = Field(
        default=3600.0, ge=1.0, description="How long the stream keeps block events."
    )
    nats_durable_bytes: Size = Field(
        default=1 << 30, ge=1 << 20, description="How much the stream keeps at most."
    )
    nats_durable_replicas: int = Field(
        default=1, ge=1, le=5, description="On how many servers of a cluster the stream is kept."
    )
    tls: TlsSettings | None = Field(
        default=None, description="TLS to the NATS server; without it the URL decides."
    )
    zmq_bind: str = Field(
        default="tcp://127.0.0.1:0",
        description="Where this program's events are published with `zmq`; port 0 is any free one.",
    )
    zmq_peers: list[str] = Field(
        default=[],
        description="Addresses of the publishers to listen to with `zmq`, as `tcp://HOST:PORT`.",
    )
    zmq_advertise_host: str | None = Field(
        default=None,
        description="The host others reach this program's events by with `zmq`; by default that of "
        "`zmq_bind`, or this machine's address where that is a wildcard.",
    )
    zmq_high_water_messages: int = Field(
        default=100_000,
        ge=1,
        le=10_000_000,
        description="Messages that may wait for one slow listener, and from one publisher, with "
        "`zmq`; more are dropped, and counted by the listener.",
    )
    queue_messages: int = Field(
        default=4096,
        ge=1,
        description="Messages that may wait to be sent; more are dropped and counted.",
    )
    queue_bytes: Size = Field(
        default=64 << 20,
        ge=1,
        description="Bytes that may wait to be sent; more are dropped and counted.",
    )
    linger: Duration = Field(
        default=0.005,
        description="How long block events are gathered before they are sent as one batch.",
    )
    batch_events: int = Field(
        default=512,
        ge=1,
        le=65536,
        description="A batch of this many block events is sent at once.",
    )
    ring_keys: int = Field(
        default=1 << 18,
        ge=1,
        description="Keys in the recent block events that are kept for consumers that missed some.",
    )
    ring_bytes: Size = Field(
        default=32 << 20,
        ge=0,
        description="Recent events for routers that are kept for those that missed some; 28 bytes "
        "a block. Who missed more is given everything.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_access(self)
        if self.nats_durable and self.plane != "nats":
            raise ValueError(f"nats_durable needs plane nats; it is {self.plane}")
        if self.nats_embedded:
            self._check_embedded()
        for address in [self.zmq_bind, *self.zmq_peers]:
            if not address.startswith(("tcp://", "ipc://")):
                raise ValueError(f"{address!r} is no ZMQ address; accepted: tcp://HOST:PORT")
        return self

    def _check_embedded(self) -> None:
        found = urlsplit(self.nats_url)
        if self.plane != "nats" or self.tls is not None:
            raise ValueError("nats_embedded needs plane nats, without tls")
        if self.nats_password is None:
            raise ValueError("nats_embedded needs nats_user and nats_password")
        if found.scheme != "nats" or not is_loopback(found.hostname or "") or not found.port:
            raise ValueError(
                f"nats_embedded: nats_url {self.nats_url!r} is not nats://127.0.0.1:PORT"
            )

    @property
    def nats_urls(self) -> list[str]:
        return [url.strip() for url in self.nats_url.split(",")]
