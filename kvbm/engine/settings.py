"""How an engine is registered, watched and stopped: the settings of `kvbm engine`."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from runtime.engine_card import COMPONENT, ENDPOINT, Role
from runtime.names import EndpointName, parse_instance_id
from runtime.settings import Section
from runtime.units import Duration, Secret

_PART: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"


class EngineSettings(Section):
    namespace: str | None = Field(
        default=None,
        pattern=_PART,
        description="Namespace of the instance: what is in one does not see what is in another; "
        "by default `events.namespace`.",
    )
    component: str = Field(
        default=COMPONENT,
        pattern=_PART,
        description="Component of the instance; its endpoint is `generate`.",
    )
    role: Role = Field(
        default="aggregated",
        description="What requests the engine is for, where prefill and decode are apart.",
    )
    host: str | None = Field(
        default=None,
        description="The name or address that others reach the engine by; by default the one it "
        "listens on, or this host's name if it listens on all.",
    )
    worker_id: Annotated[int, BeforeValidator(parse_instance_id)] | None = Field(
        default=None,
        description="The instance's number, in decimal or as 0x and hexadecimal; by default a "
        "random one, or for `attach` the one that the daemon knows the engine by.",
    )
    program: str | None = Field(
        default=None,
        description="The command that starts the server, before the arguments, for example "
        "`numactl -N0 vllm serve`; by default vLLM of the Python that runs `kvbm`.",
    )
    api_key: Secret | None = Field(
        default=None,
        description="What the engine's OpenAI server asks for, or `file:PATH`; by default what its "
        "own arguments or `VLLM_API_KEY` say.",
    )
    health_interval: Duration = Field(
        default=2.0,
        ge=0.01,
        le=600,
        description="Time between two looks at the engine's `/health`.",
    )
    health_timeout: Duration = Field(
        default=5.0, ge=0.01, le=600, description="Most that one answer of the engine may take."
    )
    unhealthy_after: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="After so many bad looks in a row the instance is `healthy` no more.",
    )
    canary_interval: Duration = Field(
        default=30.0,
        ge=0,
        description="An engine that has computed no token for so long is asked for one; 0: never.",
    )
    canary_timeout: Duration = Field(
        default=10.0, ge=0.01, le=3600, description="Most that this token may take."
    )
    start_timeout: Duration = Field(
        default=3600.0,
        ge=1,
        description="Most that an engine may take from its start to answering.",
    )
    drain_timeout: Duration = Field(
        default=60.0,
        ge=0,
        description="Most that requests in flight are waited for before the engine is stopped.",
    )
    drain_quiet: Duration = Field(
        default=2.0,
        ge=0,
        description="The engine must be without requests for so long before it is stopped: time "
        "for routers to hear that it stops.",
    )
    stop_timeout: Duration = Field(
        default=30.0, ge=0, description="Most that the engine may take to end before it is killed."
    )

    def endpoint(self, namespace: str) -> EndpointName:
        """Of the instance; `namespace` where the settings name none. Raises NameRefused."""
        return EndpointName(self.namespace or namespace, self.component, ENDPOINT)
