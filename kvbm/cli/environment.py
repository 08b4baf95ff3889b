"""What `kvbm doctor` looks at in this Python environment: clashing packages, NIXL, vLLM, CuPy."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from kvbm.cli.findings import Finding, Place, ok, problem, warning

OURS: Final = "kvbm-daemon"
PACKAGES: Final = ("kvbm", "connectors", "storage_tiers", "runtime")
VLLM_OLDEST: Final = (0, 32)


def check_environment(place: Place | None) -> Iterator[Finding]:
    """Findings in the environment that the command runs in; the daemon may have another."""
    packages = importlib.metadata.packages_distributions()
    yield _clashes(packages)
    yield _movers(place)
    yield _vllm(packages)
    yield _gpu(packages)


def _gpu(packages: Mapping[str, list[str]], device: Path = Path("/dev/nvidia0")) -> Finding:
    """What the connector needs in the environment of an engine that keeps KV on a GPU."""
    for distribution in packages.get("cupy", ()):
        return ok("GPU", f"{distribution} {importlib.metadata.version(distribution)} is installed")
    if not device.exists():
        return ok("GPU", "no NVIDIA GPU is seen")
    return warning(
        "GPU",
        "there is an NVIDIA GPU, and CuPy is missing: an engine with its KV cache there does not "
        "start with the connector",
        f"install {OURS}[cuda] (CUDA 12) or {OURS}[cuda13] in the engines' environment",
    )


def _clashes(packages: Mapping[str, list[str]]) -> Finding:
    others = {
        (package, distribution)
        for package in PACKAGES
        for distribution in packages.get(package, ())
        if re.sub(r"[-_.]+", "-", distribution).lower() != OURS
    }
    if not others:
        return ok("packages", f"no other project brings {', '.join(PACKAGES)}")
    said = ", ".join(f"{package!r} of {distribution}" for package, distribution in sorted(others))
    names = " ".join(sorted({distribution for _, distribution in others}))
    return problem(
        "packages",
        f"another project's packages are in this environment: {said}",
        f"pip uninstall {names}, then install {OURS} again; or use an environment of its own",
    )


def _movers(place: Place | None) -> Finding:
    from storage_tiers.nixl import availability

    why_not = availability("POSIX")
    movers = {} if place is None else place.movers
    running = ", ".join(f"{tier} by {mover}" for tier, mover in movers.items())
    moved = f"; moved now: {running}" if running else ""
    wanted = None if place is None else place.ssd_mover
    has_nixl = movers.get("G3", "nixl").startswith("nixl")
    if why_not is None and (wanted in {None, "plain"} or has_nixl):
        return ok("NIXL", f"loads, with its POSIX plugin{moved}")
    if why_not is None:
        return warning(
            "NIXL",
            f"loads here, but the daemon does not use it{moved}",
            f"install {OURS}[nixl] in the daemon's environment",
        )
    make = problem if wanted == "nixl" and not movers else warning
    return make(
        "NIXL",
        f"{why_not}{moved}",
        f"pip install '{OURS}[nixl]'; without it the SSD is moved with preadv and pwritev",
    )


def _vllm(packages: Mapping[str, list[str]]) -> Finding:
    oldest = ".".join(map(str, VLLM_OLDEST))
    for distribution in packages.get("vllm", ()):
        version = importlib.metadata.version(distribution)
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or tuple(map(int, numbers.groups())) >= VLLM_OLDEST:
            return ok("vLLM", f"{distribution} {version}, supported from {oldest} on")
        return problem(
            "vLLM",
            f"{distribution} {version} has not the seam that the connector needs",
            f"install vLLM {oldest} or newer",
        )
    return warning(
        "vLLM",
        "not in this environment",
        f"where engines run, install {OURS} beside vLLM {oldest} or newer",
    )
