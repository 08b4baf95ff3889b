"""What a PromQL expression asks of the metrics that there are: names, labels, how they are read."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

import promql_parser as promql

from router.node_feed import NodeState
from runtime.metrics import Spec
from storage_tiers.base import RemovalReason, TierName
from tests.deploy.chart import ROOT

Labels = frozenset[str]

OF_TARGETS: Final = frozenset({"instance", "job", "node"})
RATES: Final = {"rate", "irate", "increase"}
PARTS: Final = {"_bucket": frozenset({"le"}), "_sum": frozenset[str](), "_count": frozenset[str]()}
# Labels whose values are a closed set, and one of ours to know.
VALUES: Final[dict[tuple[str, str], type[Enum]]] = {
    ("kvbm_tier_errors_total", "tier"): TierName,
    ("kvbm_evictions_total", "reason"): RemovalReason,
    ("kvbm_router_feed_nodes", "state"): NodeState,
}


class Wrong(Exception):
    """Says what is wrong with an expression."""


@dataclass(frozen=True, slots=True)
class Known:
    kind: Literal["counter", "gauge", "histogram"]
    labels: Labels


def known_metrics() -> dict[str, Known]:
    """As Prometheus has them: of histograms the series that they are made of."""
    modules = ("kvbm.daemon.metrics", "router.metrics", "frontend.meter", "planner.metrics")
    found = {"up": Known("gauge", frozenset()), **dict(_of_the_connector())}
    for module in modules:
        specs: tuple[Spec, ...] = importlib.import_module(module).SPECS
        for spec in specs:
            labels = frozenset(spec.labels)
            if spec.kind != "histogram":
                found[spec.name] = Known(spec.kind, labels)
                continue
            for part, more in PARTS.items():
                found[spec.name + part] = Known("counter", labels | more)
    return found


def _of_the_connector() -> Iterator[tuple[str, Known]]:
    """Read from the source, because importing it takes vLLM, and that takes its time."""
    tree = ast.parse((ROOT / "connectors/vllm/stats.py").read_text())
    names = {
        node.targets[0].id: str(node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    (table,) = (
        node.value
        for function in tree.body
        if isinstance(function, ast.FunctionDef) and function.name == "metric_definitions"
        for node in function.body
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict)
    )
    for key, made in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Name) and isinstance(made, ast.Call)
        assert isinstance(made.func, ast.Name)
        is_counter = "Counter" in made.func.id
        labels = ast.literal_eval(made.args[1]) if len(made.args) > 1 else ()
        name = f"{names[key.id]}_total" if is_counter else names[key.id]
        yield name, Known("counter" if is_counter else "gauge", frozenset(labels))


def judged(text: str, known: dict[str, Known]) -> Labels:
    """The labels of what the expression gives. Raises Wrong."""
    try:
        tree = promql.parse(text)
    except ValueError as error:
        raise Wrong(f"{text}: {error}") from error
    return _labels(tree, known, within_rate=False)


def _labels(node: Any, known: dict[str, Known], *, within_rate: bool) -> Labels:
    match node:
        case promql.VectorSelector():
            return _selected(node, known, within_rate=within_rate)
        case promql.MatrixSelector():
            return _selected(node.vector_selector, known, within_rate=within_rate)
        case promql.ParenExpr() | promql.UnaryExpr():
            return _labels(node.expr, known, within_rate=within_rate)
        case promql.Call():
            is_rate = node.func.name in RATES
            found = [_labels(item, known, within_rate=is_rate) for item in node.args]
            gone = {"le"} if node.func.name == "histogram_quantile" else set()
            if gone and "le" not in found[-1]:
                raise Wrong("histogram_quantile of what has no le")
            return frozenset().union(*found) - gone
        case promql.AggregateExpr():
            inner = _labels(node.expr, known, within_rate=within_rate)
            return _grouped(inner, node.modifier)
        case promql.BinaryExpr():
            return _joined(node, known)
        case promql.NumberLiteral() | promql.StringLiteral():
            return frozenset()
    raise Wrong(f"{type(node).__name__} is not looked into")


def _selected(node: Any, known: dict[str, Known], *, within_rate: bool) -> Labels:
    name = node.name or ""
    if name not in known:
        raise Wrong(f"there is no metric {name!r}")
    found = known[name]
    labels = found.labels | OF_TARGETS
    for matcher in node.matchers.matchers:
        if matcher.name not in labels:
            raise Wrong(f"{name} has no label {matcher.name!r}")
        values = VALUES.get((name, matcher.name))
        if values is not None and not set(matcher.value.split("|")) <= {v.value for v in values}:
            raise Wrong(f"{matcher.name} of {name} is never {matcher.value!r}")
    if within_rate and found.kind == "gauge":
        raise Wrong(f"{name} is a gauge: it has no rate")
    return labels


def _grouped(inner: Labels, modifier: Any) -> Labels:
    if modifier is None:
        return frozenset()
    labels = frozenset(modifier.labels)
    if not labels <= inner:
        raise Wrong(f"grouped by {sorted(labels - inner)}, which is not there")
    is_by = modifier.type == promql.AggModifierType.By
    return labels if is_by else inner - labels


def _joined(node: Any, known: dict[str, Known]) -> Labels:
    left = _labels(node.lhs, known, within_rate=False)
    right = _labels(node.rhs, known, within_rate=False)
    matching = node.modifier.matching if node.modifier is not None else None
    if matching is not None and not set(matching.labels) <= left | right:
        raise Wrong(f"matched on {matching.labels}, which are not there")
    if isinstance(node.lhs, promql.NumberLiteral):
        return right
    return left | right if str(node.op) == "or" else left


def without_variables(text: str) -> str:
    """A dashboard's expression as Grafana would send it."""
    text = text.replace("$__rate_interval", "5m").replace("$__interval", "1m")
    return re.sub(r"\$(\w+|\{\w+\})", ".*", text)
