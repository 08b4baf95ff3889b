"""All settings of kvbm-router, one table for code, errors and documentation.

`python -m router.settings` prints docs/ROUTER_CONFIG.md.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from router.approximate import BLOCKS_MAX, TTL_S
from router.feed_settings import FeedSettings
from router.index import WORKERS_MAX
from router.limits import BusyLimits
from router.load import SEQUENCES_MAX
from router.peers import SIGN_OF_LIFE_S, SILENCE_S
from router.queue import QUEUE_MAX, Order
from router.selector import PolicyName, SessionMode
from runtime.discovery import DiscoverySettings
from runtime.events import EventPlaneSettings
from runtime.requests import RequestPlaneSettings
from runtime.settings import Loaded, Section, Settings, load
from runtime.settings_docs import LAYERS, markdown
from runtime.telemetry import LogSettings
from runtime.units import Duration, Secret, Size
from runtime.web.settings import WebSettings

PROGRAM: Final = "kvbm-router"
ENV_PREFIX: Final = "KVBM_ROUTER_"


class SecondsSettings(Section):
    decode_weight: float = Field(
        default=0.5,
        ge=0.0,
        description="How much a second of decoding counts beside one of waiting for the first "
        "token; 0 chooses by the first token alone.",
    )
    expected_output_tokens: int = Field(
        default=256,
        ge=0,
        description="Output of a request that does not say how much it expects.",
    )


class BlocksSettings(Section):
    overlap_credit: float = Field(
        default=1.0, ge=0.0, le=1.0, description="What a block found in G1 is worth."
    )
    overlap_decay: float = Field(
        default=0.0,
        ge=0.0,
        description="How fast that falls where a worker has more prompt to compute than others.",
    )
    host_credit: float = Field(
        default=0.75, ge=0.0, le=1.0, description="What a block found in G2 is worth."
    )
    disk_credit: float = Field(
        default=0.25, ge=0.0, le=1.0, description="What a block found in G3 or G4 is worth."
    )
    prefill_scale: float = Field(
        default=1.0, ge=0.0, description="What a block to compute costs, beside one in use."
    )
    request_weight: float = Field(
        default=0.0, ge=0.0, description="What a running request costs, in blocks."
    )


class LimitSettings(Section):
    blocks_fraction: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="A worker is busy above this share of its KV blocks in use; `null`: never.",
    )
    prefill_tokens: int | None = Field(
        default=None,
        ge=0,
        description="A worker is busy with more prompt tokens than this to compute; `null`: never.",
    )
    prefill_fraction: float | None = Field(
        default=None,
        ge=0.0,
        description="The same, as a share of what the worker takes into one step.",
    )

    @property
    def limits(self) -> BusyLimits:
        return BusyLimits(self.blocks_fraction, self.prefill_tokens, self.prefill_fraction)


class BusySettings(LimitSettings):
    status: Literal[529, 503] = Field(
        default=529,
        description="HTTP status where all workers are busy, the line is full, or waiting took too "
        "long.",
    )
    retry_after: Duration = Field(
        default=1.0, ge=0.0, description="What `Retry-After` says then, in whole seconds."
    )


class QueueSettings(Section):
    hold_above: float | None = Field(
        default=None,
        ge=0.0,
        description="Requests wait while every worker has more prompt tokens to compute than this "
        "share of what it takes into one step; 0: any at all; `null`: none waits.",
    )
    limit: int = Field(
        default=QUEUE_MAX, ge=1, description="Requests that may wait; more are refused."
    )
    order: Order = Field(
        default="fcfs",
        description="Among equal strict priorities: first come, last come, or weighted shortest.",
    )
    deadline: Duration = Field(
        default=30.0,
        gt=0.0,
        description="The longest wait of a request that names none, and of any.",
    )


class DisaggregationSettings(Section):
    enforce: bool = Field(
        default=False,
        description="Refuse requests while no prefill worker is there, rather than have decode "
        "workers compute prompts.",
    )
    conditional: bool = Field(
        default=False,
        description="Have the decode worker itself compute a prompt of which little is new there.",
    )
    local_tokens: int = Field(
        default=2048, ge=0, description="Little: fewer new tokens than this, and"
    )
    local_ratio: float = Field(
        default=0.7, ge=0.0, description="a smaller share of the prompt than this."
    )


class IndexSettings(Section):
    source: Literal["events", "routes"] = Field(
        default="events",
        description="`events`: what nodes and engines say they hold. `routes`: what was sent where "
        "in the last `index.routes_ttl`, for engines that say nothing.",
    )
    capacity: int = Field(
        default=1 << 22,
        ge=1024,
        description="Distinct blocks in the index, about 35 bytes each.",
    )
    workers_max: int = Field(
        default=WORKERS_MAX,
        ge=1,
        le=1 << 14,
        description="Workers of all models; more are left out.",
    )
    predicted_ttl: Duration = Field(
        default=0.0,
        ge=0.0,
        description="Beside events, take a prompt to be where it was sent for this long, until its "
        "worker says so itself; 0: do not.",
    )
    warm_up: Duration = Field(
        default=10.0,
        ge=0.0,
        description="How long at most a new router is not ready because nodes have not told yet "
        "what they hold.",
    )
    routes_ttl: Duration = Field(
        default=TTL_S, gt=0.0, description="How long routes are remembered with `routes`."
    )
    routes_capacity: int = Field(
        default=BLOCKS_MAX,
        ge=1024,
        description="Blocks of routes remembered for one model; of more the oldest go.",
    )


class SnapshotSettings(Section):
    path: Path = Field(description="File that the index is kept in over restarts.")
    interval: Duration = Field(
        default=60.0, ge=1.0, description="How often it is written, besides at the end."
    )
    max_age: Duration = Field(
        default=600.0, gt=0.0, description="An older one is not read: too much has happened."
    )


class ReplicaSettings(Section):
    sync: bool = Field(
        default=True,
        description="Tell other routers of a model what was sent where, over the event plane.",
    )
    silence: Duration = Field(
        default=SILENCE_S,
        ge=2 * SIGN_OF_LIFE_S,
        description="A router silent for this long is gone, and what it had sent counts no more.",
    )


class ReservationSettings(Section):
    limit: int = Field(
        default=1 << 16,
        ge=1,
        le=SEQUENCES_MAX,
        description="Requests that may be running at a time, as told over HTTP or the request "
        "plane.",
    )
    expiry: Duration = Field(
        default=600.0,
        gt=0.0,
        description="A request of which nothing is heard for this long is taken for ended.",
    )


class ComponentSettings(Section):
    name: str = Field(
        default="router",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$",
        description="Component whose endpoints `route`, `explain`, `forecast` and `events` are "
        "served.",
    )


class HttpSettings(WebSettings):
    section = "http"

    port: int = Field(default=9480, ge=0, le=65535, description="Its TCP port; 0 for any free one.")
    body_max: Size = Field(
        default=16 << 20,
        ge=4096,
        description="The largest body of a request; a token takes up to 7 bytes.",
    )
    concurrency: int = Field(
        default=1024,
        ge=1,
        description="Requests answered at a time, those that wait for a worker included.",
    )


class DashboardSettings(Section):
    planner: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+$",
        description="Address of the planner whose plans the dashboard shows, as "
        "`http://127.0.0.1:9086`.",
    )
    planner_token: Secret | None = Field(
        default=None, description="What the planner's API asks for, or `file:PATH`."
    )

    @property
    def token_text(self) -> str | None:
        return None if self.planner_token is None else self.planner_token.get_secret_value()


class RoutingSettings(Settings):
    """How requests are routed, whoever does it for whom."""

    name: str = Field(
        default_factory=lambda: default_name(socket.gethostname()),
        pattern=r"^[A-Za-z0-9_-]{1,80}$",
        description="This router's, unlike any other's.",
        json_schema_extra={"default_text": "the host's name and a random number"},
    )
    models: list[str] = Field(
        default=[], description="Models to route for; none named: all whose engines are found."
    )
    block_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1 << 16,
        description="Tokens of a block. By default what a model's first engine says; engines that "
        "say otherwise are left out.",
    )
    policy: PolicyName = Field(
        default="kv", description="How a worker is chosen ([ROUTER.md](ROUTER.md))."
    )
    prefill_policy: PolicyName | None = Field(
        default=None, description="The same for prefill workers; `null`: as `policy`."
    )
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="Above 0 the `kv` policies draw by lot, cheaper workers more often.",
    )
    sessions: SessionMode = Field(
        default="soft",
        description="Requests of a session go to one worker: `hard` never to another, `soft` to "
        "the next of its order while that is busy; `off`: sessions count for nothing.",
    )
    seconds: SecondsSettings = Field(default=SecondsSettings(), description="The policy `kv`.")
    blocks: BlocksSettings = Field(
        default=BlocksSettings(), description="The policy `kv-blocks`: weights of its formula."
    )
    busy: LimitSettings = Field(
        default=LimitSettings(), description="Limits above which a worker is sent nothing."
    )
    queue: QueueSettings = Field(default=QueueSettings(), description="Requests that wait.")
    disaggregation: DisaggregationSettings = Field(
        default=DisaggregationSettings(), description="With prefill workers beside decode workers."
    )
    index: IndexSettings = Field(default=IndexSettings(), description="Which worker holds what.")
    feed: FeedSettings = Field(
        default=FeedSettings(), description="How the streams of nodes are followed."
    )
    replicas: ReplicaSettings = Field(default=ReplicaSettings(), description="Several routers.")
    reservations: ReservationSettings = Field(
        default=ReservationSettings(), description="Requests sent by callers of the API."
    )
    discovery: DiscoverySettings = Field(
        default=DiscoverySettings(), description="Where engines, nodes and routers are found."
    )
    events: EventPlaneSettings = Field(
        default=EventPlaneSettings(), description="The event plane; its namespace is the router's."
    )
    requests: RequestPlaneSettings = Field(
        default=RequestPlaneSettings(), description="The request plane."
    )
    log: LogSettings = Field(default=LogSettings(), description="The log, on standard error.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature and self.policy not in {"kv", "kv-blocks"}:
            raise ValueError(f"temperature is for kv and kv-blocks, not for {self.policy}")
        return self

    @classmethod
    def load(
        cls,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, object] | None = None,
    ) -> Loaded[Self]:
        """`runtime.settings.load`; `environ` is the process's if not given."""
        found = os.environ if environ is None else environ
        return load(cls, file=file, environ=found, overrides=overrides)


class RouterSettings(RoutingSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX)

    min_workers: int = Field(
        default=0, ge=0, description="The router is not ready before there were so many workers."
    )
    busy: BusySettings = Field(
        default=BusySettings(),
        description="Limits above which a worker is sent nothing; `/v1/busy_threshold` changes "
        "them at run time.",
    )
    snapshot: SnapshotSettings | None = Field(
        default=None, description="The index over restarts of this router."
    )
    component: ComponentSettings | None = Field(
        default=ComponentSettings(), description="The router on the request plane."
    )
    http: HttpSettings = Field(default=HttpSettings(), description="The HTTP API.")
    dashboard: DashboardSettings = Field(
        default=DashboardSettings(), description="What the page for operators shows."
    )


def default_name(hostname: str) -> str:
    """Two runs on one host are two routers: what the first had sent ends with it."""
    short = re.sub(r"[^A-Za-z0-9_-]", "-", hostname.partition(".")[0])[:48] or "router"
    return f"{short}-{secrets.token_hex(4)}"


def config_page() -> str:
    """docs/ROUTER_CONFIG.md."""
    return markdown(RouterSettings, "Settings of kvbm-router", _INTRODUCTION)


_INTRODUCTION: Final = (
    LAYERS
    + """\
[CONFIG.md](CONFIG.md) says how sizes, durations, secrets and lists are written.
[ROUTER.md](ROUTER.md) has the reference router's flags beside these settings.

This page is generated: `python -m router.settings > docs/ROUTER_CONFIG.md`.
"""
)


if __name__ == "__main__":
    sys.stdout.write(config_page())
