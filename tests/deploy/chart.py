"""The chart as Helm renders it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.deploy.programs import run

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "deploy/helm/kvbm"

Manifest = dict[str, Any]

EVERYTHING: Final = """\
auth: {existingSecret: ours}
fleet: {nats: {secret: nats}}
daemon:
  dram: {capacity: 96Gi, hugePages: true}
  ssd: {hostPath: ""}
  nodeSelector: {accelerator: h100}
  tolerations: [{key: gpu, operator: Exists}]
  resources: {limits: {rdma/hca: "1"}}
router: {enabled: true}
frontend: {apiKeysSecret: keys}
globalRouter: {enabled: true, pools: {num_prefill_pools: 0}}
planner: {enabled: true}
engines:
  - {name: llama, model: meta/llama, replicas: 2, args: [--max-model-len, "32768"]}
  - {name: qwen, model: qwen/qwen, role: decode, modelCache: {claim: models, readOnly: true}}
monitoring: {serviceMonitor: true, rules: true, dashboard: true}
"""


@cache
def rendered(values: str = "", *, name: str = "kv") -> tuple[Manifest, ...]:
    """All manifests, with these values over the chart's own."""
    done = _templated(values, name)
    assert done.returncode == 0, done.stderr
    return tuple(found for found in yaml.safe_load_all(done.stdout) if found)


def refusal(values: str) -> str:
    """What Helm says against these values."""
    done = _templated(values, "kv")
    assert done.returncode != 0, "they were taken"
    return done.stderr


def of_kind(manifests: tuple[Manifest, ...], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    return next(m for m in of_kind(manifests, kind) if m["metadata"]["name"] == name)


def workloads(manifests: tuple[Manifest, ...]) -> list[Manifest]:
    return of_kind(manifests, "DaemonSet", "Deployment")


def containers(workload: Manifest) -> Iterator[Manifest]:
    pod = workload["spec"]["template"]["spec"]
    yield from pod.get("initContainers", [])
    yield from pod["containers"]


def _templated(values: str, name: str) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        return run("helm", "template", name, CHART, "--namespace", "fleet", "--values", file.name)
