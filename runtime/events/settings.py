"""Which event plane a program uses, as part of its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from runtime.settings import Section
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
    zmq_bind: str = Field(
        default="tcp://127.0.0.1:0",
        description="Where this program's events are published with `zmq`; port 0 is any free one.",
    )
    zmq_peers: list[str] = Field(
        default=[],
        description="Addresses of the publishers to listen to with `zmq`, as `tcp://HOST:PORT`.",
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
        if (self.nats_user is None) != (self.nats_password is None):
            raise ValueError("nats_user and nats_password go together: give both or neither")
        if self.nats_credentials is not None and self.nats_user is not None:
            raise ValueError("give nats_credentials or nats_user with nats_password, not both")
        for url in self.nats_urls:
            if not url.startswith(("nats://", "tls://", "ws://", "wss://")):
                raise ValueError(f"nats_url: {url!r} is no NATS URL; accepted: nats://HOST:PORT")
        for address in [self.zmq_bind, *self.zmq_peers]:
            if not address.startswith(("tcp://", "ipc://")):
                raise ValueError(f"{address!r} is no ZMQ address; accepted: tcp://HOST:PORT")
        return self

    @property
    def nats_urls(self) -> list[str]:
        return [url.strip() for url in self.nats_url.split(",")]
