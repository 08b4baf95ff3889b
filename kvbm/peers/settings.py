"""The daemon's settings of peers."""

from __future__ import annotations

import re
from typing import Final, Literal

from pydantic import Field, SecretStr, field_validator

from runtime.settings import Section
from runtime.units import Duration, Secret

PORT: Final = 9471
_NODE = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.%]+)\]|(?P<host>[^\s:\[\]]+)):(?P<port>\d{1,5})")
_WILDCARDS: Final = ("0.0.0.0", "::", "")  # noqa: S104 (recognised, not bound to)


class PeerSettings(Section):
    host: str = Field(
        default="127.0.0.1",
        description="Address on which other nodes may read this one's host memory.",
    )
    port: int = Field(default=PORT, ge=0, le=65535, description="Its TCP port; 0 for any free one.")
    advertise: str | None = Field(
        default=None,
        description="Host under which others reach this node, told over NATS; `null` for "
        "`peers.host`, or the host's name if that is a wildcard.",
    )
    nodes: list[str] = Field(
        default=[],
        max_length=64,
        description="Peers as `HOST:PORT`. With `events.plane: nats` they also find each other; "
        "this node itself may be in the list.",
    )
    token: Secret = Field(
        description="Secret that all nodes share, at least 8 characters, or `file:PATH`. It says "
        "who may read; bytes travel unencrypted, so the network must be trusted.",
    )
    mover: Literal["auto", "nixl", "plain"] = Field(
        default="auto",
        description="What reads the bytes: `nixl` (UCX), `plain` (TCP), or `auto`: NIXL where "
        "both nodes have it.",
    )
    deadline: Duration = Field(
        default=2.0,
        gt=0,
        le=30,
        description="How long chunks may take to come from peers before other tiers are asked.",
    )

    @field_validator("nodes")
    @classmethod
    def _addresses(cls, nodes: list[str]) -> list[str]:
        for node in nodes:
            parse_node(node)
        return nodes

    @field_validator("token")
    @classmethod
    def _long_enough(cls, token: SecretStr) -> SecretStr:
        if len(token.get_secret_value()) < 8:
            raise ValueError("a token is at least 8 characters")
        return token

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [parse_node(node) for node in self.nodes]

    def advertised(self, hostname: str) -> str:
        """The host that other nodes are told."""
        return self.advertise or (hostname if self.host in _WILDCARDS else self.host)


def parse_node(node: str) -> tuple[str, int]:
    """Host and port. Raises ValueError."""
    found = _NODE.fullmatch(node)
    if found is None or not 0 < int(found["port"]) <= 65535:
        raise ValueError(f"{node!r} is no address; accepted: HOST:PORT, [IPV6]:PORT")
    return found["six"] or found["host"], int(found["port"])
