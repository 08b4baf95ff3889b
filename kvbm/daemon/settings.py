"""All settings of kvbm-daemon, one table for code, errors and documentation.

`DaemonSettings.load` is the only place where the daemon reads its configuration. Each field says
its meaning and unit; what fields demand of each other is checked here, before anything is opened.
`python -m kvbm.daemon.settings` prints docs/CONFIG.md; with a file as argument it checks the file.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from kvbm.address import (
    ADMIN_TOKEN_VARIABLE,
    ADMIN_URL_VARIABLE,
    WORKER_ID_VARIABLE,
    default_socket,
)
from kvbm.engine.settings import EngineSettings
from kvbm.peers.settings import PeerSettings
from runtime.discovery.settings import DiscoverySettings
from runtime.events.node_stream import COMPONENT, ENDPOINT
from runtime.events.settings import EventPlaneSettings
from runtime.names import EndpointName
from runtime.requests.settings import RequestPlaneSettings
from runtime.settings import Loaded, Section, Settings, SettingsError, load
from runtime.settings_docs import LAYERS, markdown
from runtime.telemetry import LogSettings
from runtime.units import Duration, Secret, Size, format_size
from runtime.web.settings import WebSettings

PROGRAM: Final = "kvbm-daemon"
_SOCKET_PATH_BYTES_MAX: Final = 107  # sun_path, less its final zero
_DRAM_BYTES_MIN: Final = 16 << 20
_SSD_BYTES_MIN: Final = 64 << 20
_S3_OBJECT_BYTES_MIN: Final = 64 << 10
_OF_THE_COMMAND: Final = {ADMIN_URL_VARIABLE, ADMIN_TOKEN_VARIABLE, WORKER_ID_VARIABLE}
_OF_OTHERS: Final = (
    "KVBM_ROUTER_",
    "KVBM_FRONTEND_",
    "KVBM_GLOBAL_ROUTER_",
    "KVBM_PLANNER_",
)  # programs whose settings begin like ours
_SALT_LENGTH_MIN: Final = 16
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


Eviction = Literal["lru", "s3-fifo", "value"]
_EVICTION: Final = (
    "Which chunk goes first: `lru`, `s3-fifo` (which what is used once cannot flush), or `value`: "
    "chance of reuse, learnt while running, times what computing it again costs, by its bytes."
)


class DramSettings(Section):
    capacity: Size = Field(
        default=4 << 30,
        ge=_DRAM_BYTES_MIN,
        description="Host memory for chunks, shared with every engine on the node.",
    )
    huge_pages: bool = Field(
        default=False,
        description="Back the memory with huge pages; they must be reserved (hugetlbfs).",
    )
    handover: bool = Field(
        default=True,
        description="Leave the contents for the next daemon at a restart, and take over what the "
        "one before left; needs systemd's unit (`print-unit`) or `kvbm-daemon hold`.",
    )
    prefault: bool = Field(
        default=False,
        description="Take the memory from the system in the background, right after the start, "
        "rather than as it is first used, which makes what is brought up then wait. Not done "
        "where the system has less available than `dram.capacity`.",
    )
    scrub_interval: Duration = Field(
        default=3600.0,
        description="Time for one pass that checks every chunk in host memory against its "
        "checksum; 0 for none.",
    )
    eviction: Eviction = Field(default="value", description=_EVICTION)
    admission: Literal["all", "seen-twice"] = Field(
        default="all",
        description="Which chunks are taken in: `all`, or those that were offered before.",
    )


class SsdSettings(Section):
    path: Path = Field(
        description="Directory on the local SSD; made if absent, used by one daemon."
    )
    capacity: Size = Field(ge=_SSD_BYTES_MIN, description="Most that may be kept in `ssd.path`.")
    recover: Literal["none", "quiet", "strict"] = Field(
        default="quiet",
        description="What to do with the contents found at start: `none` forgets them, `quiet` "
        "keeps what is sound, `strict` refuses to start if anything is not.",
    )
    mover: Literal["auto", "nixl", "plain"] = Field(
        default="auto",
        description="What moves the bytes: `nixl`, `plain` (preadv and pwritev), or `auto`: NIXL "
        "where it loads.",
    )
    eviction: Eviction = Field(default="value", description=_EVICTION)
    admission: Literal["all", "seen-twice", "value"] = Field(
        default="all",
        description="Which chunks are written: `all`, those that were offered before "
        "(`seen-twice`), or those worth at least what would go for them (`value`).",
    )
    write_budget: Size | None = Field(
        default=None,
        gt=0,
        description="Most that is written in a day, in bytes, to spare the drive; what is unused "
        "is kept for an hour. `null` for no bound.",
    )
    scrub_interval: Duration = Field(
        default=7 * 86400.0,
        description="Time for one pass that reads back every chunk on the SSD and checks it; 0 for "
        "none.",
    )
    scrub_bandwidth: Size = Field(
        default=256 << 20,
        ge=1 << 20,
        description="Most that scrubbing the SSD reads in a second. It gives way to engines.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.admission == "value" and self.eviction != "value":
            raise ValueError(f"admission value needs eviction value, not {self.eviction}")
        return self

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()


class S3Settings(Section):
    bucket: str = Field(description="Bucket, which must exist; 3 to 63 characters.")
    prefix: str = Field(
        default="kvbm/", description="Prefix of every object; nodes that share chunks share it."
    )
    endpoint_url: str | None = Field(
        default=None,
        description="URL of an S3 other than Amazon's, for example `http://127.0.0.1:8333`.",
    )
    region: str | None = Field(default=None, description="Region; by default the AWS chain's.")
    access_key_id: Secret | None = Field(
        default=None,
        description="Access key, or `file:PATH`; by default the AWS chain's credentials.",
    )
    secret_access_key: Secret | None = Field(
        default=None, description="Secret key, or `file:PATH`; goes with `access_key_id`."
    )
    capacity: Size = Field(
        default=1 << 40,
        description="Most that all nodes together keep under `s3.prefix`; beyond it the oldest "
        "objects are deleted. Nodes that share the prefix must agree.",
    )
    max_age: Duration | None = Field(
        default=None, description="Objects older than this are deleted; `null` keeps them."
    )
    object_bytes: Size = Field(
        default=16 << 20,
        ge=_S3_OBJECT_BYTES_MIN,
        description="Consecutive chunks of a sequence are packed into objects up to this size.",
    )
    linger: Duration = Field(
        default=1.0, description="How long an object that is not full waits for more chunks."
    )
    refresh: Duration = Field(
        default=10.0, gt=0, description="How often the bucket is searched for other nodes' chunks."
    )
    timeout: Duration = Field(
        default=30.0,
        gt=0,
        description="How long a request to S3 may take, with what is tried again of it; then "
        "what it was for has failed, and an engine computes what it waited for.",
    )
    note_reads_per_s: float = Field(
        default=50.0,
        ge=0,
        description="Most requests in a second that read what other nodes' objects hold, for "
        "routers: one for each object found that is not known. 0 for none; routers then hear of "
        "these chunks only when they are loaded.",
    )
    admission: Literal["all", "seen-twice"] = Field(
        default="all",
        description="Which chunks are written: `all`, or those that were offered before.",
    )
    put_budget: int | None = Field(
        default=None,
        gt=0,
        description="Most objects written in a day by this node, for each costs money; what is "
        "unused is kept for an hour. `null` for no bound.",
    )

    @field_validator("bucket")
    @classmethod
    def _bucket_name(cls, bucket: str) -> str:
        if not 3 <= len(bucket) <= 63:
            raise ValueError(f"{bucket!r} has {len(bucket)} characters; accepted: 3 to 63")
        if _BUCKET.fullmatch(bucket) is None or ".." in bucket:
            raise ValueError(
                f"{bucket!r} is no bucket name; accepted: lower-case letters, digits, dots and "
                "hyphens, beginning and ending with a letter or digit"
            )
        return bucket

    @field_validator("prefix")
    @classmethod
    def _whole_prefix(cls, prefix: str) -> str:
        if prefix.startswith("/"):
            raise ValueError(f"{prefix!r} must not begin with a slash")
        return prefix if not prefix or prefix.endswith("/") else f"{prefix}/"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key go together: both or neither")
        if self.endpoint_url and not self.endpoint_url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint_url: {self.endpoint_url!r} is neither http:// nor https://")
        if self.capacity < self.object_bytes:
            raise ValueError(
                f"capacity {format_size(self.capacity)} does not hold one object of "
                f"object_bytes {format_size(self.object_bytes)}"
            )
        return self


class TenantSettings(Section):
    tag: int = Field(
        ge=1,
        le=255,
        description="A number of the tenant's own, the same on all nodes and for ever: chunks are "
        "told apart by it.",
    )
    salt: Secret = Field(
        description="Goes into every key, or `file:PATH`; at least 16 characters, the same on all "
        "nodes that share chunks."
    )
    dram_quota: Size | None = Field(
        default=None, gt=0, description="Most of host memory its chunks may take; `null`: all."
    )
    ssd_quota: Size | None = Field(
        default=None, gt=0, description="Most of the SSD its chunks may take; `null`: all."
    )
    s3_quota: Size | None = Field(
        default=None,
        gt=0,
        description="Beyond this much of its chunks in S3 this node adds none; `null`: no bound.",
    )

    @field_validator("salt")
    @classmethod
    def _long(cls, salt: SecretStr) -> SecretStr:
        if len(salt.get_secret_value()) < _SALT_LENGTH_MIN:
            raise ValueError(f"a salt has at least {_SALT_LENGTH_MIN} characters")
        return salt


class AdminSettings(WebSettings):
    section = "admin"

    port: int = Field(default=9470, ge=0, le=65535, description="Its TCP port; 0 for any free one.")


class OffloadSettings(Section):
    batch_chunks: int = Field(
        default=256, ge=1, le=4096, description="Chunks written to the SSD in one go, at most."
    )
    batch_bytes: Size = Field(
        default=32 << 20,
        ge=1,
        description="Host memory held against eviction while one batch is written to a tier, at "
        "most; at least one chunk is. The SSD writes two batches at a time.",
    )
    queue_chunks: int = Field(
        default=4096,
        ge=1,
        description="Chunks that may wait to be written to a lower tier; more are not offloaded.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.queue_chunks < self.batch_chunks:
            raise ValueError(
                f"queue_chunks {self.queue_chunks} is less than batch_chunks {self.batch_chunks}"
            )
        return self


class LeaseSettings(Section):
    fraction: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Most of host memory that engines may hold as free slots to store into, "
        "as a fraction of `dram.capacity`.",
    )


class OnboardSettings(Section):
    max_bytes_in_flight: Size | None = Field(
        default=None,
        ge=1,
        description="Host memory that chunks on their way up may take at a time; `null` for a "
        "quarter of `dram.capacity`.",
    )


class GovernorSettings(Section):
    mode: Literal["auto", "always_load"] = Field(
        default="auto",
        description="`auto` loads only as much of a prefix as is sooner loaded than computed, by "
        "what tiers and engines were measured to take; `always_load` loads all that is kept.",
    )


class WhatIfSettings(Section):
    enabled: bool = Field(
        default=True, description="Watch how lookups would fare with tiers of other sizes."
    )
    keys: int = Field(
        default=8192,
        ge=1024,
        le=1 << 20,
        description="Keys in the sample, at most; each takes about 400 bytes. Four times as many "
        "halve the error.",
    )
    rate: float = Field(
        default=0.125,
        gt=0,
        le=1,
        description="The largest part of all keys that is sampled, however few there are: each one "
        "costs the event loop a microsecond or two when it is asked for.",
    )
    window: Duration = Field(
        default=3600.0,
        ge=60,
        description="The traffic that answers are of: what was asked for so long ago counts a "
        "third in the curve, and nothing in `kvbm what-if`.",
    )
    reach: Size | None = Field(
        default=None,
        gt=0,
        description="The largest tier that can be asked about; `null` for four times the larger of "
        "`dram.capacity` and `ssd.capacity`. The further, the thinner the sample.",
    )


class DaemonSettings(Settings):
    socket: Path = Field(
        default_factory=lambda: default_socket(os.environ, os.getuid()),
        description="Unix socket that engines connect to.",
        json_schema_extra={
            "default_text": "`$RUNTIME_DIRECTORY/kvbm.sock` under systemd, else "
            "`/run/user/UID/kvbm/kvbm.sock`, else `/tmp/kvbm-UID/kvbm.sock`"
        },
    )
    node: str = Field(
        default_factory=lambda: _node_name(socket.gethostname()),
        pattern=r"^[A-Za-z0-9_-]{1,48}$",
        description="Name of this node in events, metrics and the names of its S3 objects.",
        json_schema_extra={"default_text": "the host's name"},
    )
    dram: DramSettings = Field(default=DramSettings(), description="G2: chunks in host memory.")
    ssd: SsdSettings | None = Field(default=None, description="G3: chunks on the local SSD.")
    s3: S3Settings | None = Field(
        default=None, description="G4: chunks in S3, shared by all nodes."
    )
    peers: PeerSettings | None = Field(
        default=None, description="Host memory of other nodes: read theirs, and let them read."
    )
    events: EventPlaneSettings = Field(
        default=EventPlaneSettings(), description="Block events, for routers."
    )
    discovery: DiscoverySettings = Field(
        default=DiscoverySettings(),
        description="Where routers find this node; not used if `events.plane` is `none`.",
    )
    requests: RequestPlaneSettings = Field(
        default=RequestPlaneSettings(),
        description="How routers ask this node for what they missed; not used if `events.plane` is "
        "`none`.",
    )
    admin: AdminSettings = Field(default=AdminSettings(), description="Admin REST and metrics.")
    log: LogSettings = Field(default=LogSettings(), description="Logging, to standard error.")
    offload: OffloadSettings = Field(
        default=OffloadSettings(), description="Writing down: host memory to SSD to S3."
    )
    lease: LeaseSettings = Field(default=LeaseSettings(), description="Slots lent to engines.")
    onboard: OnboardSettings = Field(
        default=OnboardSettings(), description="Bringing up: S3 or SSD to host memory."
    )
    governor: GovernorSettings = Field(
        default=GovernorSettings(), description="Loading against computing."
    )
    what_if: WhatIfSettings = Field(
        default=WhatIfSettings(),
        description="What another size of a tier would change: `kvbm what-if`.",
    )
    engine: EngineSettings = Field(
        default=EngineSettings(),
        description="For `kvbm engine` ([ENGINES.md](ENGINES.md)), which registers engines in "
        "`discovery` whatever `events.plane` is; the daemon itself needs none of it.",
    )

    tenants: dict[str, TenantSettings] = Field(
        default={},
        description="By name, which engines give as `tenant` in `kv_connector_extra_config`. "
        "Tenants share nothing. If there are any, an engine of none is refused.",
    )

    @property
    def onboard_bytes_max(self) -> int:
        given = self.onboard.max_bytes_in_flight
        return self.dram.capacity // 4 if given is None else given

    @property
    def what_if_reach(self) -> int:
        kept = max(self.dram.capacity, 0 if self.ssd is None else self.ssd.capacity)
        return 4 * kept if self.what_if.reach is None else self.what_if.reach

    @field_validator("tenants")
    @classmethod
    def _distinct_tags(cls, tenants: dict[str, TenantSettings]) -> dict[str, TenantSettings]:
        by_tag: dict[int, str] = {}
        for name, tenant in tenants.items():
            other = by_tag.setdefault(tenant.tag, name)
            if other != name:
                raise ValueError(f"{other!r} and {name!r} have the same tag {tenant.tag}")
        return tenants

    @field_validator("socket")
    @classmethod
    def _short_path(cls, path: Path) -> Path:
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
            raise ValueError(f"{path} is longer than {_SOCKET_PATH_BYTES_MAX} bytes")
        return path

    @model_validator(mode="after")
    def _check(self) -> Self:
        room = self.dram.capacity
        if self.onboard_bytes_max > room:
            raise ValueError(
                f"onboard.max_bytes_in_flight {format_size(self.onboard_bytes_max)} "
                f"is more than dram.capacity {format_size(room)}"
            )
        if self.events.plane != "none":
            EndpointName(self.events.namespace, COMPONENT, ENDPOINT)  # raises a ValueError
        if self.s3 is not None and self.s3.object_bytes > room:
            raise ValueError(
                f"s3.object_bytes {format_size(self.s3.object_bytes)} is more than dram.capacity "
                f"{format_size(room)}: an object could not be read"
            )
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
        ours = {
            name: value
            for name, value in found.items()
            if name not in _OF_THE_COMMAND and not name.startswith(_OF_OTHERS)
        }
        return load(cls, file=file, environ=ours, overrides=overrides)


def config_page() -> str:
    """docs/CONFIG.md."""
    return markdown(DaemonSettings, "Settings of kvbm-daemon", _INTRODUCTION)


def main(arguments: list[str]) -> int:
    """Print the page, or check the file given."""
    if not arguments:
        sys.stdout.write(config_page())
        return 0
    try:
        DaemonSettings.load(Path(arguments[0]))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _node_name(hostname: str) -> str:
    """The host's short name with what events' subjects do not allow replaced."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", hostname.partition(".")[0])[:48] or "node"


_INTRODUCTION: Final = (
    LAYERS
    + """\

A **size** is a whole number of bytes or `512MiB`, `64GiB`, `2TB`. A **duration** is a number of
seconds or `250ms`, `5s`, `10min`, `1h`, `7d`. A **secret** is never shown or logged; `file:PATH`
reads it from a file, as with systemd's `LoadCredential=`. A section can be given as JSON in one
variable (`KVBM_SSD='{"path": "/ssd", "capacity": "1TiB"}'`) or assignment. A **list** or a
**mapping** is JSON as well; with `--set` a list can be `a,b` (`--set peers.nodes=n1:9471,n2:9471`),
and a mapping can be given by name (`--set KEY.NAME=VALUE`).

This page is generated: `python -m kvbm.daemon.settings > docs/CONFIG.md`.
"""
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
