"""The reference's JSON configuration of pools, read as it is.

Keys and defaults are those of NVIDIA Dynamo 1.6's `global_router_config.json`, its older names of
targets without a unit included. What it cannot mean is refused with the key and the reason, a key
that is not known by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, StrictInt, model_validator

from router.pools.grid import Axis, Feature, Mapping, Override, Strategy
from router.pools.settings import GlobalRouterSettings
from runtime.engine_card import Role
from runtime.names import NameRefused, component_prefix
from runtime.settings import Problem, Section, Settings, SettingsError, load

POOLS_MAX: Final = 256
CELLS_MAX: Final = 1024  # of one axis

Cells = Field(ge=1, le=CELLS_MAX)


class PriorityOverride(Section):
    min_priority: StrictInt
    max_priority: StrictInt
    target_pool: StrictInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_priority > self.max_priority:
            raise ValueError(
                f"min_priority {self.min_priority} is above max_priority {self.max_priority}"
            )
        return self


class _Grid(Section):
    model_config = ConfigDict(allow_inf_nan=False, populate_by_name=True)

    priority_overrides: list[PriorityOverride] = Field(default=[], max_length=1024)

    def axis(self, feature: Feature, name: str, unit: str = "") -> Axis:
        """Raises ValueError."""
        low, high = getattr(self, f"{name}_min{unit}"), getattr(self, f"{name}_max{unit}")
        if not low < high:
            raise ValueError(f"{name}_min{unit} {low:g} is not below {name}_max{unit} {high:g}")
        return Axis(feature, low, high, getattr(self, f"{name}_resolution"))


def _aliased(name: str) -> Any:
    """The reference once had these names without the unit, and still reads them."""
    return Field(validation_alias=AliasChoices(f"{name}_ms", name))


class PrefillStrategy(_Grid):
    isl_min: float
    isl_max: float
    isl_resolution: StrictInt = Cells
    ttft_min_ms: float = _aliased("ttft_min")
    ttft_max_ms: float = _aliased("ttft_max")
    ttft_resolution: StrictInt = Cells
    prefill_pool_mapping: list[list[StrictInt]]

    def axes(self) -> tuple[Axis, ...]:
        return self.axis("tokens", "isl"), self.axis("ttft_ms", "ttft", "_ms")


class DecodeStrategy(_Grid):
    context_length_min: float
    context_length_max: float
    context_length_resolution: StrictInt = Cells
    itl_min_ms: float = _aliased("itl_min")
    itl_max_ms: float = _aliased("itl_max")
    itl_resolution: StrictInt = Cells
    decode_pool_mapping: list[list[StrictInt]]

    def axes(self) -> tuple[Axis, ...]:
        return self.axis("tokens", "context_length"), self.axis("itl_ms", "itl", "_ms")


class AggStrategy(_Grid):
    ttft_min_ms: float = _aliased("ttft_min")
    ttft_max_ms: float = _aliased("ttft_max")
    ttft_resolution: StrictInt = Cells
    itl_min_ms: float = _aliased("itl_min")
    itl_max_ms: float = _aliased("itl_max")
    itl_resolution: StrictInt = Cells
    isl_min: float | None = None
    isl_max: float | None = None
    isl_resolution: StrictInt | None = Field(default=None, ge=1, le=CELLS_MAX)
    agg_pool_mapping: list[list[StrictInt]] | list[list[list[StrictInt]]]

    def axes(self) -> tuple[Axis, ...]:
        given = [one is not None for one in (self.isl_min, self.isl_max, self.isl_resolution)]
        targets = self.axis("ttft_ms", "ttft", "_ms"), self.axis("itl_ms", "itl", "_ms")
        if any(given) and not all(given):
            raise ValueError("isl_min, isl_max and isl_resolution go together: give all or none")
        return (self.axis("tokens", "isl"), *targets) if all(given) else targets


class PoolsConfig(Settings):
    """Keys of the other mode are read over, as the reference does."""

    mode: Literal["disagg", "agg"] = "disagg"
    enable_priority_retry: bool = Field(default=False, strict=True)
    num_prefill_pools: StrictInt | None = None
    num_decode_pools: StrictInt | None = None
    num_agg_pools: StrictInt | None = None
    prefill_pool_dynamo_namespaces: list[str] | None = None
    decode_pool_dynamo_namespaces: list[str] | None = None
    agg_pool_dynamo_namespaces: list[str] | None = None
    prefill_pool_priorities: list[StrictInt] | None = None
    decode_pool_priorities: list[StrictInt] | None = None
    agg_pool_priorities: list[StrictInt] | None = None
    prefill_pool_selection_strategy: PrefillStrategy | None = None
    decode_pool_selection_strategy: DecodeStrategy | None = None
    agg_pool_selection_strategy: AggStrategy | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.strategies()
        return self

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises SettingsError, which says all that is wrong."""
        return load(cls, file=file).value

    def strategies(self) -> tuple[Strategy, ...]:
        """One for each role that is served."""
        if self.mode == "agg":
            return (self._strategy("agg", "aggregated"),)
        return self._strategy("prefill", "prefill"), self._strategy("decode", "decode")

    def _strategy(self, kind: str, role: Role) -> Strategy:
        """Raises ValueError."""
        names = {
            "count": f"num_{kind}_pools",
            "namespaces": f"{kind}_pool_dynamo_namespaces",
            "strategy": f"{kind}_pool_selection_strategy",
        }
        missing = [name for name in names.values() if getattr(self, name) is None]
        if missing:
            raise ValueError(f"mode {self.mode} needs {', '.join(missing)}")
        count, spaces = getattr(self, names["count"]), getattr(self, names["namespaces"])
        if not 0 < count <= POOLS_MAX:
            raise ValueError(f"{names['count']} is {count}; accepted: 1 to {POOLS_MAX}")
        _check_namespaces(names["namespaces"], spaces, count)
        priorities = getattr(self, f"{kind}_pool_priorities")
        if priorities is None:
            priorities = list(range(count))
        elif len(priorities) != count:
            raise ValueError(
                f"{kind}_pool_priorities has {len(priorities)} numbers for {count} pools"
            )
        strategy = getattr(self, names["strategy"])
        try:
            axes = strategy.axes()
            mapping = getattr(strategy, f"{kind}_pool_mapping")
            _check_mapping(f"{kind}_pool_mapping", mapping, axes, count)
            rules = _overrides(strategy.priority_overrides, count)
        except ValueError as error:
            raise ValueError(f"{names['strategy']}.{error}") from error
        return Strategy(
            role,
            tuple(spaces),
            tuple(priorities),
            axes,
            mapping,
            rules,
            self.enable_priority_retry,
        )


def strategies_of(settings: GlobalRouterSettings) -> tuple[Strategy, ...]:
    """Raises SettingsError."""
    found = PoolsConfig.read(settings.config).strategies()
    own = settings.events.namespace
    if any(own in strategy.namespaces for strategy in found):
        reason = f"{own!r} is the global router's own namespace, and a pool's in {settings.config}"
        raise SettingsError([Problem("events.namespace", "settings", reason)])
    return found


def _check_namespaces(key: str, namespaces: Sequence[str], count: int) -> None:
    if len(namespaces) != count:
        raise ValueError(f"{key} has {len(namespaces)} names for {count} pools")
    for name in namespaces:
        try:
            component_prefix(name)
        except NameRefused as error:
            raise ValueError(f"{key}: {error}") from error


def _check_mapping(key: str, mapping: Mapping, axes: Sequence[Axis], count: int) -> None:
    """Raises ValueError."""
    axis, *deeper = axes
    if len(mapping) != axis.cells:
        raise ValueError(f"{key} has {len(mapping)} entries for {axis.cells} cells")
    for number, one in enumerate(mapping):
        where = f"{key}[{number}]"
        if isinstance(one, int) == bool(deeper):
            raise ValueError(f"{where} is {'too deep' if not deeper else 'no list'}")
        if isinstance(one, int):
            _check_pool(where, one, count)
        else:
            _check_mapping(where, one, deeper, count)


def _check_pool(where: str, pool: int, count: int) -> None:
    if not 0 <= pool < count:
        raise ValueError(f"{where} is {pool}; accepted: 0 to {count - 1}")


def _overrides(given: Sequence[PriorityOverride], count: int) -> tuple[Override, ...]:
    for number, rule in enumerate(given):
        _check_pool(f"priority_overrides[{number}].target_pool", rule.target_pool, count)
    return tuple(Override(r.min_priority, r.max_priority, r.target_pool) for r in given)
