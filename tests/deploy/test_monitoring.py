"""Alerts, dashboard and scrape example: every expression parsed, every name in it known, every
alert seen to fire and to keep quiet, and explained.
"""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.deploy.chart import EVERYTHING, ROOT, of_kind, rendered
from tests.deploy.programs import run
from tests.deploy.promql import OF_TARGETS, Wrong, judged, known_metrics, without_variables

ALERTS: Final = ROOT / "deploy/prometheus/alerts.yaml"
RULES: Final[list[dict[str, Any]]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: Final[dict[str, Any]] = json.loads((ROOT / "deploy/grafana/kvbm.json").read_text())
PANELS: Final = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
KNOWN: Final = known_metrics()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    labels = judged(rule["expr"], KNOWN)
    named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert named <= labels, "its text names labels that it does not have"
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_there_is(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        labels = judged(without_variables(target["expr"]), KNOWN)
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= labels, target["legendFormat"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kvbm_tier_used_byte", "no metric"),
        ("rate(kvbm_tier_stored_bytes[5m])", "no metric"),
        ('kvbm_tier_used_bytes{teir="G2"}', "no label 'teir'"),
        ('rate(kvbm_tier_errors_total{tier="G5"}[5m])', "never 'G5'"),
        ('kvbm_router_feed_nodes{state=~"live|lost"}', "never 'live|lost'"),
        ("sum by (queue) (kvbm_tier_used_bytes)", "grouped by"),
        ("rate(kvbm_tier_used_bytes[5m])", "gauge"),
        ("histogram_quantile(0.9, rate(kvbm_router_queue_wait_seconds_count[5m]))", "no le"),
        ("kvbm_router_queue_wait_seconds > 1", "no metric"),
        ("sum(kvbm_tier_used_bytes", "kvbm_tier_used_bytes"),
    ],
)
def test_an_expression_that_is_wrong_is_refused(text: str, why: str) -> None:
    with pytest.raises(Wrong, match=re.escape(why)):
        judged(text, KNOWN)


def test_the_dashboard_s_variables_and_places_are_sound() -> None:
    assert DASHBOARD["schemaVersion"] >= 41
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert found is not None
            assert found[2] in KNOWN[found[1]].labels | OF_TARGETS
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used - {"__rate_interval"} == variables
    for one, other in combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        assert not _overlap(one, other)
        assert one["x"] + one["w"] <= 24


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size]
        for at, size in (("x", "w"), ("y", "h"))
    )


def test_every_alert_is_explained_and_nothing_else_is() -> None:
    page = (ROOT / "docs/OPERATING.md").read_text()
    explained = re.findall(r"^### (Kvbm\w+)$", page, re.MULTILINE)
    assert explained == [rule["alert"] for rule in RULES], "in the order of the rules"
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/OPERATING.md#{rule['alert'].lower()}"


# Alert -> series as Prometheus's unit tests write them: when it shall fire, and when it shall not.
# https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/#series
FIRES: Final[dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    "KvbmProgramDown": ({'up{job="kvbm-router"}': "0x60"}, {'up{job="kvbm-router"}': "1x60"}),
    "KvbmDaemonNotReady": (
        {'kvbm_ready{check="G4"}': "0x60"},
        {'kvbm_ready{check="G4"}': "1x60"},
    ),
    "KvbmRouterNotReady": (
        {'kvbm_router_ready{check="events"}': "0x60"},
        {'kvbm_router_ready{check="events"}': "1x60"},
    ),
    "KvbmPlannerNotReady": (
        {'kvbm_planner_ready{check="engines"}': "0x60"},
        {'kvbm_planner_ready{check="engines"}': "1x60"},
    ),
    "KvbmCorruptChunks": (
        {'kvbm_corrupt_chunks_total{tier="G3"}': "0x40 1x20"},
        {'kvbm_corrupt_chunks_total{tier="G3"}': "7x60"},
    ),
    "KvbmScrubFindings": (
        {'kvbm_scrubbed_chunks_total{tier="G2",outcome="damaged"}': "_x40 1x20"},
        {'kvbm_scrubbed_chunks_total{tier="G2",outcome="sound"}': "0+5x60"},
    ),
    "KvbmQuarantinedSpace": (
        {'kvbm_quarantined_bytes{tier="G3"}': "4096x120"},
        {'kvbm_quarantined_bytes{tier="G3"}': "0x120"},
    ),
    "KvbmTierErrors": (
        {'kvbm_tier_errors_total{tier="G4",op="load"}': "0+3x60"},
        {'kvbm_tier_errors_total{tier="peer",op="gone"}': "0+3x60"},
    ),
    "KvbmPeerErrors": (
        {'kvbm_tier_errors_total{tier="peer",op="load"}': "0+30x60"},
        {'kvbm_tier_errors_total{tier="peer",op="load"}': "0+1x60"},
    ),
    "KvbmChunksDropped": (
        {'kvbm_dropped_chunks_total{queue="offload_G3",reason="queue_full"}': "0+600x60"},
        {'kvbm_dropped_chunks_total{queue="offload_G3",reason="budget"}': "0+600x60"},
    ),
    "KvbmQueueNearlyFull": (
        {'kvbm_queue_depth{queue="seal"}': "90x60", 'kvbm_queue_limit{queue="seal"}': "100x60"},
        {'kvbm_queue_depth{queue="seal"}': "9x60", 'kvbm_queue_limit{queue="seal"}': "100x60"},
    ),
    "KvbmTierTurnsOver": (
        {
            'kvbm_evictions_total{tier="G3",reason="capacity"}': "0+600x200",
            'kvbm_lookup_blocks_total{tier="G3",outcome="hit"}': "0+6x200",
        },
        {
            'kvbm_evictions_total{tier="G3",reason="capacity"}': "0+600x200",
            'kvbm_lookup_blocks_total{tier="G3",outcome="hit"}': "0+600x200",
        },
    ),
    "KvbmTierSlowerThanComputing": (
        {"kvbm_governor_skipped_tokens_total": "0+120000x120"},
        {"kvbm_governor_skipped_tokens_total": "0+1200x120"},
    ),
    "KvbmConnectionsRefused": (
        {'kvbm_errors_total{op="connection",kind="refused"}': "_x50 1x10"},
        {'kvbm_errors_total{op="connection",kind="refused"}': "1x60"},
    ),
    "KvbmFault": (
        {'kvbm_errors_total{op="load_G3",kind="fault"}': "_x50 1x10"},
        {'kvbm_errors_total{op="load_G3",kind="fault"}': "1x60"},
    ),
    "KvbmEngineWithoutDaemon": (
        {"vllm:kvbm_connected": "0x60"},
        {"vllm:kvbm_connected": "1x60"},
    ),
    "KvbmLoadFailures": (
        {"vllm:kvbm_load_failures_total": "_x50 1x10"},
        {"vllm:kvbm_load_failures_total": "_x50 0x10"},
    ),
    "KvbmEventsDisconnected": (
        {"kvbm_events_connected": "0x60", "kvbm_stream_ring_bytes": "0x60"},
        {"kvbm_events_connected": "0x60"},  # `events.plane: none`
    ),
    "KvbmEventsDropped": (
        {"kvbm_events_dropped_total": "0x60", "kvbm_stream_dropped_total": "0+9x60"},
        {"kvbm_events_dropped_total": "5x60", "kvbm_stream_dropped_total": "5x60"},
    ),
    "KvbmEventsNotKept": (
        {"kvbm_event_messages_unconfirmed_total": "0+2x60"},
        {"kvbm_event_messages_unconfirmed_total": "2x60"},
    ),
    "KvbmEngineEventsLost": (
        {'kvbm_engine_events_lost_total{worker="7.0"}': "0x50 1x10"},
        {'kvbm_engine_events_lost_total{worker="7.0"}': "1x60"},
    ),
    "KvbmRouterBehind": (
        {'kvbm_router_feed_nodes{state="stale"}': "1x60"},
        {'kvbm_router_feed_nodes{state="live"}': "8x60"},
    ),
    "KvbmRouterFeedFaults": (
        {'kvbm_router_feed_faults_total{kind="malformed"}': "0x50 1x10"},
        {'kvbm_router_feed_faults_total{kind="malformed"}': "1x60"},
    ),
    "KvbmRouterDisconnected": (
        {"kvbm_router_event_plane_connected": "0x60"},
        {"kvbm_router_event_plane_connected": "1x60"},
    ),
    "KvbmRouterWithoutWorkers": (
        {'kvbm_router_workers{model="m",pool="decode",state="serving"}': "0x60"},
        {
            'kvbm_router_workers{model="m",pool="decode",state="serving"}': "2x60",
            'kvbm_router_workers{model="m",pool="prefill",state="serving"}': "0x60",
        },
    ),
    "KvbmRouterRejects": (
        {
            'kvbm_router_rejected_total{model="m",kind="busy"}': "0+5x60",
            'kvbm_router_requests_started_total{model="m"}': "0+100x60",
        },
        {
            'kvbm_router_rejected_total{model="m",kind="busy"}': "0+5x60",
            'kvbm_router_requests_started_total{model="m"}': "0+1000x60",
        },
    ),
    "KvbmRouterQueueNearlyFull": (
        {
            'kvbm_router_queue_pending_requests{model="m"}': "95x60",
            'kvbm_router_queue_limit{model="m"}': "100x60",
        },
        {
            'kvbm_router_queue_pending_requests{model="m"}': "5x60",
            'kvbm_router_queue_limit{model="m"}': "100x60",
        },
    ),
    "KvbmRouterIndexNearlyFull": (
        {
            "kvbm_router_index_blocks": "95x60",
            "kvbm_router_index_capacity_blocks": "100x60",
        },
        {
            "kvbm_router_index_blocks": "50x60",
            "kvbm_router_index_capacity_blocks": "100x60",
        },
    ),
    "KvbmRouterSlow": (
        {
            'kvbm_router_overhead_seconds_bucket{step="total",le="0.01"}': "0x60",
            'kvbm_router_overhead_seconds_bucket{step="total",le="0.05"}': "0+60x60",
            'kvbm_router_overhead_seconds_bucket{step="total",le="+Inf"}': "0+60x60",
        },
        {
            'kvbm_router_overhead_seconds_bucket{step="total",le="0.01"}': "0+60x60",
            'kvbm_router_overhead_seconds_bucket{step="total",le="+Inf"}': "0+60x60",
        },
    ),
    "KvbmEnginesLeftOut": (
        {'kvbm_router_records_refused_total{why="block size"}': "_x50 1x10"},
        {'kvbm_router_records_refused_total{why="block size"}': "1x60"},
    ),
    "KvbmFrontendErrors": (
        {
            'kvbm_frontend_requests_total{model="m",outcome="success"}': "0+90x60",
            'kvbm_frontend_requests_total{model="m",outcome="engine_lost"}': "0+9x60",
        },
        {
            'kvbm_frontend_requests_total{model="m",outcome="success"}': "0+90x60",
            'kvbm_frontend_requests_total{model="m",outcome="engine_400"}': "0+9x60",
        },
    ),
    "KvbmFirstTokenSlow": (
        {
            'kvbm_frontend_time_to_first_token_seconds_bucket{model="m",le="5"}': "0x60",
            'kvbm_frontend_time_to_first_token_seconds_bucket{model="m",le="10"}': "0+9x60",
            'kvbm_frontend_time_to_first_token_seconds_bucket{model="m",le="+Inf"}': "0+9x60",
        },
        {
            'kvbm_frontend_time_to_first_token_seconds_bucket{model="m",le="5"}': "0+9x60",
            'kvbm_frontend_time_to_first_token_seconds_bucket{model="m",le="+Inf"}': "0+9x60",
        },
    ),
    "KvbmTokensSlow": (
        {
            'kvbm_frontend_inter_token_latency_seconds_bucket{model="m",le="0.1"}': "0x60",
            'kvbm_frontend_inter_token_latency_seconds_bucket{model="m",le="0.5"}': "0+9x60",
            'kvbm_frontend_inter_token_latency_seconds_bucket{model="m",le="+Inf"}': "0+9x60",
        },
        {
            'kvbm_frontend_inter_token_latency_seconds_bucket{model="m",le="0.1"}': "0+9x60",
            'kvbm_frontend_inter_token_latency_seconds_bucket{model="m",le="+Inf"}': "0+9x60",
        },
    ),
    "KvbmMigrations": (
        {'kvbm_frontend_migrations_total{model="m"}': "0+1x60"},
        {'kvbm_frontend_migrations_total{model="m"}': "0x50 1x10"},
    ),
    "KvbmPlannerFaults": (
        {'kvbm_planner_faults_total{step="apply"}': "0+1x60"},
        {'kvbm_planner_faults_total{step="apply"}': "1x60"},
    ),
    "KvbmTargetNotReached": (
        {
            'kvbm_planner_target_replicas{role="decode"}': "4x60",
            'kvbm_planner_replicas{role="decode",phase="serving"}': "3x60",
        },
        {
            'kvbm_planner_target_replicas{role="decode"}': "4x60",
            'kvbm_planner_replicas{role="decode",phase="serving"}': "3x60",
            'kvbm_planner_replicas{role="decode",phase="starting"}': "1x60",
        },
    ),
}


def test_every_alert_fires_when_it_shall_and_only_then(tmp_path: Path) -> None:
    assert list(FIRES) == [rule["alert"] for rule in RULES]
    wrong, right = ([both[at] for both in FIRES.values()] for at in (0, 1))
    fired = [
        (f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) > bool 0', _minute(series), 1)
        for alert, series in zip(FIRES, wrong, strict=True)
    ]
    quiet = [
        ('count(ALERTS{alertstate="firing"}) or vector(0)', minute, 0)
        for minute in sorted({_minute(series) for series in right})
    ]
    cases = [_case("fires", wrong, fired), _case("keeps quiet", right, quiet)]
    (tmp_path / "cases.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": cases})
    )
    found = run("promtool", "test", "rules", tmp_path / "cases.yaml")
    assert found.returncode == 0, found.stdout + found.stderr


def _minute(series: dict[str, str]) -> int:
    """Shortly before the end of the series."""
    return max(sum(int(n) for n in re.findall(r"x(\d+)", v)) for v in series.values()) - 2


def _case(
    name: str, series: list[dict[str, str]], asked: list[tuple[str, int, int]]
) -> dict[str, Any]:
    """All alerts' series at a time, each at an instance of its alert's."""
    given = [
        {"series": _at(alert, metric), "values": values}
        for alert, found in zip(FIRES, series, strict=True)
        for metric, values in found.items()
    ]
    expected = [
        {
            "expr": expr,
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": "{}", "value": value}],
        }
        for expr, minute, value in asked
    ]
    return {"name": name, "interval": "1m", "input_series": given, "promql_expr_test": expected}


def _at(alert: str, metric: str) -> str:
    name, _, labels = metric.partition("{")
    return f'{name}{{instance="{alert}",{labels or "}"}'


def test_prometheus_takes_rules_and_configuration(tmp_path: Path) -> None:
    found = run("promtool", "check", "rules", "--lint-fatal", ALERTS)
    assert found.returncode == 0, found.stdout + found.stderr
    settings = yaml.safe_load((ALERTS.parent / "prometheus.yaml").read_text())
    for job in settings["scrape_configs"]:
        # Debian's build knows no Kubernetes; what is made of what that finds is checked.
        if job.pop("kubernetes_sd_configs", None):
            job["file_sd_configs"] = [{"files": ["targets/*.yaml"]}]
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text())
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    found = run("promtool", "check", "config", tmp_path / "prometheus.yaml")
    assert found.returncode == 0, found.stdout + found.stderr


def test_prometheus_refuses_rules_that_are_broken(tmp_path: Path) -> None:
    text = ALERTS.read_text().replace("increase(", "increas(", 1)
    (tmp_path / "alerts.yaml").write_text(text)
    assert run("promtool", "check", "rules", tmp_path / "alerts.yaml").returncode != 0


def test_jobs_are_named_as_alerts_ask_for_them() -> None:
    """By the scrape example and by the chart alike: kvbm-PROGRAM."""
    example = yaml.safe_load((ALERTS.parent / "prometheus.yaml").read_text())["scrape_configs"]
    relabelled = next(job for job in example if "kubernetes_sd_configs" in job)["relabel_configs"]
    named = next(rule for rule in relabelled if rule.get("target_label") == "job")
    monitor = of_kind(rendered(EVERYTHING), "ServiceMonitor")[0]["spec"]
    for endpoint in monitor["endpoints"]:
        (given,) = endpoint["relabelings"]
        assert given["sourceLabels"] == named["source_labels"]
        assert (given["targetLabel"], given["replacement"]) == ("job", named["replacement"])
    assert 'job=~"kvbm-.+"' in RULES[0]["expr"]
