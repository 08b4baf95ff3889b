"""All settings of kvbm-planner, one table for code, errors and documentation.

Names are the reference's where the thing is the same. `python -m planner.settings` prints
docs/PLANNER_CONFIG.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from planner.forecast import POINTS_MIN, Predictor
from runtime.discovery import DiscoverySettings
from runtime.engine_card import Role
from runtime.events import EventPlaneSettings
from runtime.settings import Loaded, Section, Settings, load
from runtime.settings_docs import markdown
from runtime.telemetry import LogSettings
from runtime.units import Duration, Secret
from runtime.web.settings import WebSettings

PROGRAM: Final = "kvbm-planner"
ENV_PREFIX: Final = "KVBM_PLANNER_"


class GoalSettings(Section):
    ttft: Duration = Field(default=0.5, gt=0, description="Time to the first token to keep.")
    itl: Duration = Field(default=0.05, gt=0, description="Mean time between tokens to keep.")
    attainment: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="Share of requests whose first token shall come in time.",
    )


class ForecastSettings(Section):
    load_predictor: Predictor = Field(
        default="kalman",
        description="`constant` and `ewma` are arithmetic; `holt-winters`, `arima` and `kalman` "
        "are statsmodels' (extra `planner`).",
    )
    throughput_adjustment_interval: Duration = Field(
        default=60.0, gt=0, description="Time of one point of the series that is forecast."
    )
    window: int = Field(default=60, ge=POINTS_MIN, le=10_000, description="Points to learn from.")
    season: int = Field(
        default=0,
        ge=0,
        description="Points after which the load repeats, for `holt-winters`; 0: it does not.",
    )
    headroom: float = Field(
        default=1.0,
        ge=0,
        description="How many of the forecast's usual errors to plan for above it.",
    )


class PerfSettings(Section):
    profile: Path | None = Field(
        default=None,
        description="JSON with measured points (docs/PLANNER.md); without one, speeds are learnt "
        "from the engines alone.",
    )
    isl: float = Field(default=3000.0, gt=0, description="Prompt tokens until some were seen.")
    isl_variation: float = Field(
        default=1.2,
        ge=0,
        le=10,
        description="How different prompts are: the standard deviation of their tokens over the "
        "mean.",
    )
    osl: float = Field(default=150.0, gt=0, description="Output tokens until some were seen.")
    looks_max: int = Field(default=256, ge=16, description="Looks at engines to learn from.")
    load_min_observations: int = Field(
        default=5, ge=1, description="Looks before they are believed."
    )


class ScalingSettings(Section):
    mode: Literal["agg", "disagg", "prefill", "decode"] = Field(
        default="agg",
        description="Which pools there are: engines that do all, or prefill and decode apart, or "
        "one of these.",
    )
    min_endpoint: int = Field(default=1, ge=0, description="Engines of each pool, at least.")
    max_endpoint: int = Field(default=64, ge=1, description="Engines of each pool, at most.")
    max_gpu_budget: int = Field(
        default=8, ge=-1, description="GPUs of all pools together, at most; -1: no limit."
    )
    gpus_per_engine: dict[Role, int] = Field(
        default={}, description="By role; 1 where it is not said."
    )
    enable_throughput_scaling: bool = Field(
        default=True, description="Have the forecast set how many engines there are at least."
    )
    enable_load_scaling: bool = Field(
        default=True, description="Have what comes and waits now ask for more."
    )
    load_adjustment_interval: Duration = Field(
        default=5.0, ge=0.1, description="Time between two looks, each with a decision."
    )
    start_delay: Duration = Field(
        default=60.0,
        ge=0,
        description="From asking for an engine to its serving: so far ahead is planned. Starts "
        "that are seen and take longer count instead.",
    )
    catch_up: Duration = Field(
        default=30.0, gt=0, description="In this time, what waits shall be done."
    )
    scale_down_delay: Duration = Field(
        default=300.0, ge=0, description="So long fewer engines must have done before one goes."
    )
    scaling_down_sensitivity: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="An engine goes only if those left would be busy by this share of what they "
        "may.",
    )
    scale_up_step: int = Field(default=8, ge=1, description="Engines more at a time, at most.")
    scale_down_step: int = Field(default=1, ge=1, description="Engines fewer at a time, at most.")
    manual_hold: Duration = Field(
        default=600.0,
        ge=0,
        description="How long a number of engines that others have set is kept.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_endpoint > self.max_endpoint:
            raise ValueError(
                f"min_endpoint {self.min_endpoint} is more than max_endpoint {self.max_endpoint}"
            )
        if any(count < 1 for count in self.gpus_per_engine.values()):
            raise ValueError("gpus_per_engine: an engine has at least 1")
        return self

    @property
    def roles(self) -> tuple[Role, ...]:
        return _ROLES[self.mode]


_ROLES: Final[Mapping[str, tuple[Role, ...]]] = {
    "agg": ("aggregated",),
    "disagg": ("prefill", "decode"),
    "prefill": ("prefill",),
    "decode": ("decode",),
}


class PrometheusSettings(Section):
    url: str = Field(description="The server, without `/api`: http://HOST:PORT.")
    selector: str = Field(
        default="",
        description='More label matchers of the query, as `job="engines"`.',
    )
    token: Secret | None = Field(
        default=None, description="Sent as `Authorization: Bearer`, or `file:PATH`."
    )
    ca: Path | None = Field(
        default=None, description="Certificate that signs the server's, if it is no public one."
    )
    timeout: Duration = Field(default=10.0, gt=0, description="Most that an answer may take.")


class ObserveSettings(Section):
    frontends: list[str] = Field(
        default=[],
        description="URLs of frontends as clients use them (http://HOST:PORT), whose `/metrics` "
        "tell what arrives; none: the engines tell.",
    )
    timeout: Duration = Field(default=3.0, gt=0, description="Most that one page may take.")
    prometheus: PrometheusSettings | None = Field(
        default=None,
        description="Read a Prometheus server instead of the programs. Its `instance` labels "
        "must be the HOST:PORT of the programs' URLs.",
    )


class Workload(Section):
    kind: Literal["deployment", "statefulset"] = Field(
        default="deployment", description="What it is."
    )
    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", description="Its name in the namespace."
    )


class KubernetesSettings(Section):
    workloads: dict[Role, Workload] = Field(
        default={}, description="What runs the engines of each role."
    )
    drain_timeout: Duration = Field(
        default=600.0, gt=0, description="Most that an engine may take to finish what it has."
    )


class ProcessSettings(Section):
    command: str = Field(
        default="kvbm engine vllm",
        description="What starts one engine; `{port}` is a free port, `{role}` its role.",
    )
    environment: dict[str, str] = Field(default={}, description="More variables for it.")
    log_directory: Path = Field(
        default=Path("build/planner"), description="Where engines' output goes, a file for each."
    )
    stop_timeout: Duration = Field(
        default=120.0, gt=0, description="Most that one may take to drain and end."
    )


class VirtualSettings(Section):
    timeout: Duration = Field(
        default=1800.0,
        gt=0,
        description="A decision that nobody completes is replaced after this time.",
    )


class HttpSettings(WebSettings):
    section: ClassVar[str] = "http"

    port: int = Field(default=9086, ge=0, le=65535, description="Its TCP port; 0 for any free one.")


class PlanSettings(Section):
    """What deciding needs, live and in replay."""

    goals: GoalSettings = GoalSettings()
    forecast: ForecastSettings = ForecastSettings()
    perf: PerfSettings = PerfSettings()
    scaling: ScalingSettings = ScalingSettings()


class PlannerSettings(Settings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX)

    namespace: str = Field(default="default", description="Where the engines are found.")
    model: str | None = Field(
        default=None, description="Of which model engines count; by default all are one model's."
    )
    advisory: bool = Field(
        default=False, description="Decide and tell, but do nothing; `/v1/advisory` changes it."
    )
    actuator: Literal["dry-run", "virtual", "kubernetes", "processes"] = Field(
        default="dry-run", description="How decisions are made true."
    )
    goals: GoalSettings = Field(default=GoalSettings(), description="What users are promised.")
    forecast: ForecastSettings = Field(
        default=ForecastSettings(), description="What load is coming."
    )
    perf: PerfSettings = Field(default=PerfSettings(), description="How fast engines are.")
    scaling: ScalingSettings = Field(
        default=ScalingSettings(), description="How many there may be, and when that changes."
    )
    observe: ObserveSettings = Field(
        default=ObserveSettings(), description="What is read, and where."
    )
    virtual: VirtualSettings = Field(
        default=VirtualSettings(), description="Decisions that others carry out."
    )
    kubernetes: KubernetesSettings = Field(
        default=KubernetesSettings(),
        description="Deployments or StatefulSets; the API server is that of `discovery`.",
    )
    processes: ProcessSettings = Field(
        default=ProcessSettings(), description="Engines as processes of this machine."
    )
    history_max: int = Field(default=256, ge=1, description="Plans kept for `/v1/plan/history`.")
    http: HttpSettings = Field(default=HttpSettings(), description="The HTTP API.")
    discovery: DiscoverySettings = Field(
        default=DiscoverySettings(), description="Where engines are found."
    )
    events: EventPlaneSettings = Field(
        default=EventPlaneSettings(),
        description="The event plane of routers and nodes, whose namespace is `namespace`; with "
        "`none` only pages are read.",
    )
    log: LogSettings = Field(default=LogSettings(), description="The log, on standard error.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.actuator == "kubernetes":
            lacking = [r for r in self.scaling.roles if r not in self.kubernetes.workloads]
            if lacking:
                raise ValueError(
                    f"kubernetes.workloads names nothing for {', '.join(lacking)}; set "
                    f'kubernetes.workloads: {{"{lacking[0]}": {{"name": "NAME"}}}}'
                )
        return self

    @property
    def plan(self) -> PlanSettings:
        return PlanSettings(
            goals=self.goals, forecast=self.forecast, perf=self.perf, scaling=self.scaling
        )

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


def config_page() -> str:
    """docs/PLANNER_CONFIG.md."""
    return markdown(PlannerSettings, "Settings of kvbm-planner", _INTRODUCTION)


_INTRODUCTION: Final = """\
Later ones win: built-in defaults, the file given with `--config` (YAML or TOML), the environment,
the command line (`--set KEY=VALUE`). An unknown key is an error that names what was meant.
[CONFIG.md](CONFIG.md) says how sizes, durations and secrets are written. [PLANNER.md](PLANNER.md)
says what they are for.

This page is generated: `python -m planner.settings > docs/PLANNER_CONFIG.md`.
"""


if __name__ == "__main__":
    sys.stdout.write(config_page())
