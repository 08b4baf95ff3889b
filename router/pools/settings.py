"""All settings of kvbm-global-router: its own, and those of the routers it has for pools.

`python -m router.pools.settings` prints docs/GLOBAL_ROUTER_CONFIG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from router.settings import (
    BusySettings,
    ComponentSettings,
    HttpSettings,
    RouterSettings,
    RoutingSettings,
)
from runtime.settings import Section
from runtime.settings_docs import markdown
from runtime.units import Duration, Secret

PROGRAM: Final = "kvbm-global-router"
ENV_PREFIX: Final = "KVBM_GLOBAL_ROUTER_"


class OwnHttpSettings(HttpSettings):
    port: int = Field(default=9490, ge=0, le=65535, description="Its TCP port; 0 for any free one.")


class FeedbackSettings(Section):
    enabled: bool = Field(
        default=True,
        description="Look at what pools expect of a request before it is sent. `false`: the grid "
        "alone decides, as the reference does.",
    )
    margin: Duration = Field(
        default=1.0,
        ge=0.0,
        description="A pool that the grid did not choose is taken if it saves more than this, or "
        "keeps the targets where the chosen one is expected to miss them.",
    )
    timeout: Duration = Field(
        default=0.25,
        gt=0.0,
        description="How long a pool's own router may take to say what it expects; after that the "
        "grid's choice stands, as far as that pool goes.",
    )


class EnginesSettings(Section):
    key: Secret | None = Field(
        default=None,
        description="What engines' OpenAI servers ask for (`--api-key`), or `file:PATH`.",
    )
    silence: Duration = Field(
        default=600.0,
        gt=0.0,
        description="A server that says nothing about a request for this long is taken for gone.",
    )

    @property
    def key_text(self) -> str | None:
        return None if self.key is None else self.key.get_secret_value()


class GlobalRouterSettings(RoutingSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX)

    config: Path = Field(
        description="JSON file with the pools and their grids, as the reference's global router "
        "reads it ([POOLS.md](POOLS.md)).",
    )
    default_ttft_target: Duration | None = Field(
        default=None, ge=0.0, description="Of requests without a target; `null`: the grid's middle."
    )
    default_itl_target: Duration | None = Field(
        default=None, ge=0.0, description="The same for the time from one token to the next."
    )
    pool_routers: Literal["found", "own"] = Field(
        default="found",
        description="`found`: a pool's own kvbm-router is asked where one serves, else one that "
        "runs in this process. `own`: always one in this process.",
    )
    router_component: str = Field(
        default=ComponentSettings().name,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$",
        description="What pools' own routers are on the request plane: their `component.name`.",
    )
    engines: EnginesSettings = Field(
        default=EnginesSettings(),
        description="Engines that take tokens through their OpenAI server, as vLLM's do.",
    )
    feedback: FeedbackSettings = Field(
        default=FeedbackSettings(), description="Live load and hits of pools."
    )
    decisions: int = Field(
        default=1024, ge=1, le=1 << 20, description="Latest decisions kept for `/v1/decisions`."
    )
    http: HttpSettings = Field(default=OwnHttpSettings(), description="The HTTP API.")

    def of_pool(self, namespace: str) -> RouterSettings:
        """Of the router for a pool in this process."""
        given = {name: getattr(self, name) for name in RoutingSettings.model_fields}
        given["events"] = self.events.model_copy(update={"namespace": namespace})
        given["busy"] = BusySettings(**self.busy.model_dump())
        return RouterSettings(**given, component=None)


def config_page() -> str:
    """docs/GLOBAL_ROUTER_CONFIG.md."""
    return markdown(GlobalRouterSettings, "Settings of kvbm-global-router", _INTRODUCTION)


_INTRODUCTION: Final = """\
Later ones win: built-in defaults, the file given with `--config` (YAML, TOML or JSON), the
environment, the command line (`--set KEY=VALUE`). An unknown key is an error that names what was
meant. [CONFIG.md](CONFIG.md) says how sizes, durations and secrets are written. `events.namespace`
is where frontends find the global router; pools are in namespaces of their own. What
[ROUTER_CONFIG.md](ROUTER_CONFIG.md) has too is of the routers that it runs for pools.

This page is generated: `python -m router.pools.settings > docs/GLOBAL_ROUTER_CONFIG.md`.
"""


if __name__ == "__main__":
    sys.stdout.write(config_page())
