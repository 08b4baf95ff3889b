"""The chart: Helm lints and renders it, Kubernetes' own schemas and our own settings judge it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml

from frontend.settings import FrontendSettings
from kvbm.daemon.settings import DaemonSettings
from router.settings import RouterSettings
from tests.deploy.chart import (
    CHART,
    EVERYTHING,
    ROOT,
    Manifest,
    containers,
    named,
    of_kind,
    refusal,
    rendered,
    workloads,
)
from tests.deploy.programs import run

OLDEST, NEWEST = "1.30", "1.37"  # Kubernetes' schemas that are at hand
OF_OPERATORS: Final = {"PodMonitor", "PrometheusRule", "ServiceMonitor"}  # not Kubernetes' own
ALL_VALUES: Final = ("", EVERYTHING)
SETTINGS: Final[dict[str, Any]] = {
    "kvbm.yaml": DaemonSettings,
    "engine.yaml": DaemonSettings,
    "router.yaml": RouterSettings,
    "frontend.yaml": FrontendSettings,
}
for _file, _module, _name in (
    ("planner.yaml", "planner.settings", "PlannerSettings"),
    ("global-router.yaml", "router.pools.settings", "GlobalRouterSettings"),
):
    if importlib.util.find_spec(_module.rpartition(".")[0]) is not None:
        SETTINGS[_file] = getattr(importlib.import_module(_module), _name)


@pytest.mark.parametrize("values", ALL_VALUES)
def test_helm_lints_the_chart(values: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(values)
    found = run("helm", "lint", "--strict", CHART, "--values", tmp_path / "values.yaml")
    assert found.returncode == 0, found.stdout
    assert "0 chart(s) failed" in found.stdout


def test_helm_refuses_a_chart_that_is_broken(tmp_path: Path) -> None:
    broken = tmp_path / "kvbm"
    shutil.copytree(CHART, broken)
    (broken / "templates/router.yaml").write_text('{{ include "kvbm.absent" . }}')
    assert run("helm", "lint", "--strict", broken).returncode != 0


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("values", ALL_VALUES)
def test_kubernetes_takes_every_manifest(values: str, version: str) -> None:
    manifests = [m for m in rendered(values) if m["kind"] not in OF_OPERATORS]
    assert {"DaemonSet", "Deployment", "Role", "PodDisruptionBudget"} <= {
        m["kind"] for m in manifests
    }
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def _misspelt(manifest: Manifest) -> None:
    manifest["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []


def _without_selector(manifest: Manifest) -> None:
    del manifest["spec"]["selector"]


def _wrong_type(manifest: Manifest) -> None:
    manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = "long"


@pytest.mark.parametrize("spoil", [_misspelt, _without_selector, _wrong_type])
def test_kubernetes_refuses_a_manifest_that_is_broken(spoil: Any) -> None:
    manifest = deepcopy(of_kind(rendered(), "DaemonSet")[0])
    kubernetes_validate.validate(manifest, NEWEST, strict=True)
    spoil(manifest)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_the_values_agree_with_their_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)
    assert set(values) == set(schema["properties"]) - {"global"}, "Helm itself sets `global`"
    for section, given in values.items():
        if isinstance(given, dict):
            assert set(given) == set(schema["properties"][section]["properties"]), section


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ("daemon: {dram: {capacity: 64GB}}", "/daemon/dram/capacity"),
        ("fronted: {enabled: true}", "fronted"),
        ("fleet: {nats: {url: http://nats}}", "/fleet/nats/url"),
        ("planner: {enabled: true, replicas: 2}", "/planner/replicas"),
        ("engines: [{name: llama}]", "/engines/0"),
    ],
)
def test_helm_refuses_values_that_make_no_sense(values: str, place: str) -> None:
    assert place in refusal(values)


WITHOUT_PEERS: Final = """\
daemon: {peers: false, ssd: {enabled: false}, settings: {s3: {bucket: kv-cache}}}
serviceAccount: {annotations: {eks.amazonaws.com/role-arn: "arn:aws:iam::1:role/kv"}}
"""


@pytest.mark.parametrize("values", [*ALL_VALUES, WITHOUT_PEERS])
def test_the_programs_take_the_settings_and_variables_they_get(values: str, tmp_path: Path) -> None:
    """Every file with the loader of its program, in the environment that its container has."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    checked = set()
    for workload in workloads(rendered(values)):
        name = workload["metadata"]["name"]
        for file, text in named(rendered(values), "ConfigMap", name)["data"].items():
            if file not in SETTINGS:
                continue
            settings = yaml.safe_load(text)
            environ = {item["name"]: _variable(item) for item in _main(workload)["env"]}
            for section in ("admin", "http", "peers"):
                if section in settings:
                    assert settings[section]["token"].startswith("file:/etc/kvbm-auth/")
                    settings[section]["token"] = f"file:{secret}"
            if settings.get("openai", {}).get("api_keys"):
                settings["openai"]["api_keys"] = [f"file:{secret}"]
            if "KVBM_ADMIN_TOKEN" in environ:
                environ["KVBM_ADMIN_TOKEN"] = "0123456789abcdef"
            (tmp_path / file).write_text(yaml.safe_dump(settings))
            loaded = SETTINGS[file].load(tmp_path / file, environ=environ)
            assert not loaded.ignored, "variables that name no setting"
            checked.add(file)
            _check_reachable(file, loaded.value)
    assert checked == (set(SETTINGS) if values == EVERYTHING else {"kvbm.yaml", "frontend.yaml"})


def _check_reachable(file: str, settings: Any) -> None:
    """From other pods, in one namespace of events, over Kubernetes' discovery."""
    if file == "planner.yaml":
        assert settings.namespace == "default"
        assert settings.events.plane == "nats"
        assert settings.actuator == "kubernetes"
        workloads = settings.kubernetes.workloads
        assert workloads["aggregated"].name == "kv-kvbm-engine-llama"
        return
    assert settings.events.namespace == "default"
    assert settings.discovery.discovery == "kubernetes"
    if file == "engine.yaml":
        assert settings.engine.host == "10.1.2.3"
        return
    assert settings.events.plane == "nats"
    assert settings.requests.host == "0.0.0.0" and settings.requests.advertise_host == "10.1.2.3"
    if file == "kvbm.yaml":
        assert settings.peers is None or settings.peers.advertise == "10.1.2.3"
        assert (settings.peers is None) == (settings.s3 is not None), "as the values have it"
        assert settings.dram.prefault, "memory counts for the container that touches it first"


def _variable(item: dict[str, Any]) -> str:
    if "value" in item:
        return str(item["value"])
    field = item["valueFrom"].get("fieldRef", {}).get("fieldPath", "")
    return {"status.podIP": "10.1.2.3"}.get(field, "text")


def _main(workload: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("values", ALL_VALUES)
def test_pods_may_do_little_and_have_what_they_name(values: str) -> None:
    found = workloads(rendered(values))
    assert len(found) == (7 if values else 2)
    for workload in found:
        pod = workload["spec"]["template"]["spec"]
        assert pod["enableServiceLinks"] is False, "else a Service is a variable KVBM_..._PORT"
        assert pod["securityContext"]["runAsUser"] == 10001
        assert not pod.get("hostIPC") and not pod.get("hostPID"), "memory comes by descriptor"
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in containers(workload):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"]["drop"] == ["ALL"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            ports = {port["name"] for port in container.get("ports", [])}
            probes = [container[key] for key in container if key.endswith("Probe")]
            assert {probe["httpGet"]["port"] for probe in probes} <= ports


@pytest.mark.parametrize("values", ALL_VALUES)
def test_every_selector_finds_the_pods_it_is_meant_for(values: str) -> None:
    labels = {
        w["metadata"]["name"]: w["spec"]["template"]["metadata"]["labels"]
        for w in workloads(rendered(values))
    }
    chosen: dict[str, set[str]] = {"Service": set(), "PodDisruptionBudget": set()}
    for manifest in of_kind(rendered(values), *chosen):
        selector = manifest["spec"]["selector"]
        selector = selector.get("matchLabels", selector)
        found = [n for n, has in labels.items() if selector.items() <= has.items()]
        assert found == [manifest["metadata"]["name"]]
        chosen[manifest["kind"]].add(found[0])
    assert chosen["PodDisruptionBudget"] == set(labels)
    assert chosen["Service"] == {name for name in labels if "-engine-" not in name}


def test_a_service_monitor_finds_every_port_with_metrics() -> None:
    manifests = rendered(EVERYTHING)
    monitor = of_kind(manifests, "ServiceMonitor")[0]["spec"]
    services = of_kind(manifests, "Service")
    wanted = monitor["selector"]["matchLabels"].items()
    assert all(wanted <= service["metadata"]["labels"].items() for service in services)
    scraped = {endpoint["port"] for endpoint in monitor["endpoints"]}
    assert scraped == {p["name"] for service in services for p in service["spec"]["ports"]}


def test_a_pod_monitor_finds_the_engines() -> None:
    manifests = rendered(EVERYTHING)
    monitor = of_kind(manifests, "PodMonitor")[0]["spec"]
    (wanted,) = monitor["selector"]["matchExpressions"]
    ports = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for workload in workloads(manifests):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        is_engine = labels[wanted["key"]] in wanted["values"]
        assert is_engine == ("-engine-" in workload["metadata"]["name"])
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        if is_engine:
            assert ports <= {port["name"] for port in _main(workload)["ports"]}


def test_memory_is_for_the_tier_and_the_daemon() -> None:
    def limits(values: str) -> dict[str, str]:
        daemon = named(rendered(values), "DaemonSet", "kv-kvbm-daemon")
        resources: dict[str, dict[str, str]] = _main(daemon)["resources"]
        shared = {name: resources["requests"][name] for name in resources["requests"]}
        assert shared.pop("cpu") and shared.items() <= resources["limits"].items()
        return resources["limits"]

    assert limits("") == {"memory": f"{(64 + 4) << 10}Mi"}
    assert limits(EVERYTHING) == {
        "hugepages-2Mi": f"{96 << 10}Mi",
        "memory": f"{4 << 10}Mi",
        "rdma/hca": "1",
    }


def test_accounts_may_do_what_discovery_and_the_planner_do() -> None:
    manifests = rendered(EVERYTHING)
    roles = {m["metadata"]["name"]: m["rules"] for m in of_kind(manifests, "Role")}
    everything = {"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}
    granted = {r["resources"][0]: set(r["verbs"]) for r in roles["kv-kvbm-discovery"]}
    assert granted == {"leases": everything, "configmaps": everything}
    scale, pods = roles["kv-kvbm-planner"]
    assert scale["resources"] == ["deployments/scale", "statefulsets/scale"]
    assert scale["verbs"] == ["get", "patch"]
    assert pods["resources"] == ["pods"] and {"patch", "delete"} <= set(pods["verbs"])
    bound = {
        binding["roleRef"]["name"]: {subject["name"] for subject in binding["subjects"]}
        for binding in of_kind(manifests, "RoleBinding")
    }
    assert bound["kv-kvbm-planner"] == {"kv-kvbm-planner"}
    for workload in workloads(manifests):
        assert (
            workload["spec"]["template"]["spec"]["serviceAccountName"] in bound["kv-kvbm-discovery"]
        )
    assert not of_kind(rendered("fleet: {discovery: etcd}"), "Role")


def test_engines_share_the_directory_of_the_daemons_socket() -> None:
    """And their events come through it, for the daemon does not see their loopback."""
    manifests = rendered(EVERYTHING)
    daemon = named(manifests, "DaemonSet", "kv-kvbm-daemon")
    engine = named(manifests, "Deployment", "kv-kvbm-engine-llama")
    shared = [
        next(v["hostPath"] for v in w["spec"]["template"]["spec"]["volumes"] if "hostPath" in v)
        for w in (daemon, engine)
    ]
    assert shared[0] == shared[1] == {"path": "/run/kvbm", "type": "DirectoryOrCreate"}
    arguments = _main(engine)["args"]
    events = json.loads(arguments[arguments.index("--kv-events-config") + 1])
    assert all(address.startswith("ipc:///run/kvbm/$(POD_NAME).") for address in events.values())
    assert engine["spec"]["replicas"] == 2
    assert "replicas" not in named(manifests, "Deployment", "kv-kvbm-engine-qwen")["spec"]


def test_every_program_that_is_run_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for workload in workloads(rendered(EVERYTHING)):
        command = _main(workload)["command"]
        if command[0] != "/bin/sh":
            assert command[0] in project["scripts"]


def test_rules_and_dashboard_are_those_of_the_repository() -> None:
    manifests = rendered(EVERYTHING)
    rules = of_kind(manifests, "PrometheusRule")[0]["spec"]
    assert rules == yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
    found = named(manifests, "ConfigMap", "kv-kvbm-dashboard")["data"]["kvbm.json"]
    assert json.loads(found) == json.loads((ROOT / "deploy/grafana/kvbm.json").read_text())
