"""systemd's own tools on every unit; and programs that tell systemd what their units wait for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any, Final

import pytest

from frontend.settings import FrontendSettings
from kvbm.daemon.settings import DaemonSettings
from router.settings import RouterSettings
from runtime.program import Load
from runtime.unit import Program, unit_text

ROOT: Final = Path(__file__).parents[2]
UNITS: Final = sorted((ROOT / "deploy").glob("*.service"))
EXPOSURE_MAX: Final = {"kvbm-daemon": 2.0, "kvbm-engine@": 4.5}  # engines need their devices
EXPOSURE_OF_OTHERS_MAX: Final = 1.5
NOTIFIES: Final = {
    "kvbm-frontend": True,
    "kvbm-global-router": True,
    "kvbm-planner": True,
    "kvbm-router": True,
}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here"
)


def test_every_program_has_its_unit() -> None:
    assert {unit.stem for unit in UNITS} == {"kvbm-daemon", "kvbm-engine@", *NOTIFIES}


@pytest.mark.parametrize("name", NOTIFIES)
def test_the_units_that_are_deployed_are_those_that_are_printed(name: str) -> None:
    settings = Path(f"/etc/kvbm/{name.removeprefix('kvbm-')}.yaml")
    program = Program(
        name, Path("/opt/kvbm/bin") / name, settings, "kvbm", "kvbm", notifies=NOTIFIES[name]
    )
    assert (ROOT / "deploy" / f"{name}.service").read_text() == unit_text(program)


def test_a_program_prints_its_unit() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "router",
            "print-unit",
            "--user",
            "ops",
            "--config",
            "/srv/a b.yaml",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    name = "kvbm-router"
    program = Path(sys.executable).parent / name
    where = Program(name, program, Path("/srv/a b.yaml"), "ops", "ops", notifies=True)
    assert done.stdout == unit_text(where)
    assert f'{program} serve --config "/srv/a b.yaml"' in done.stdout


def test_the_examples_of_settings_make_one_fleet_of_a_machine() -> None:
    """Units have /tmp to themselves, so that discovery's own choice would keep them apart."""
    loads: dict[str, Load[Any]] = {
        "kvbm": DaemonSettings.load,
        "router": RouterSettings.load,
        "frontend": FrontendSettings.load,
    }
    found = {
        name: load(ROOT / f"deploy/{name}.example.yaml", environ={}).value
        for name, load in loads.items()
    }
    for settings in found.values():
        assert settings.discovery == found["kvbm"].discovery
        assert settings.discovery.file_directory == Path("/var/lib/kvbm/discovery")
        assert settings.events == found["kvbm"].events
    assert found["router"].http.port != found["frontend"].http.port
    for unit in UNITS:
        assert _read(unit.read_text())["Service"]["StateDirectory"] == "kvbm"


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_understands_the_unit(unit: Path, tmp_path: Path) -> None:
    found = _verified(unit.name, unit.read_text(), tmp_path)
    assert found.returncode == 0, found.stderr
    assert not found.stderr


@needs_systemd
@pytest.mark.parametrize(
    "spoilt",
    [
        ("LimitNOFILE=65536", "LimitNoFile=65536"),
        ("StartLimitBurst=10", "StartLimitBurst=often"),
        ("Restart=on-failure", "Restart=on-tuesdays"),
    ],
)
def test_systemd_refuses_a_unit_that_is_wrong(spoilt: tuple[str, str], tmp_path: Path) -> None:
    text = (ROOT / "deploy/kvbm-router.service").read_text().replace(*spoilt)
    assert _verified("kvbm-router.service", text, tmp_path).stderr


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_unit_leaves_little_to_an_intruder(unit: Path) -> None:
    """systemd's own score: 0 is nothing, 10 all that a service of the system may."""
    limit = EXPOSURE_MAX.get(unit.stem, EXPOSURE_OF_OTHERS_MAX)
    # Given as tenths.
    threshold = f"--threshold={round(10 * limit)}"
    command = ["systemd-analyze", "security", "--offline=true", threshold, str(unit)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stdout.splitlines()[-1:] or found.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_nothing_has_to_be_there_first(unit: Path) -> None:
    """Programs of a fleet start and restart in any order, so units only order, never require."""
    found = _read(unit.read_text())
    assert not {"Requires", "Requisite", "BindsTo", "PartOf", "Upholds"} & set(found["Unit"])
    assert found["Service"]["RestartPreventExitStatus"] == "2"


def test_the_frontend_may_finish_what_it_has() -> None:
    service = _read((ROOT / "deploy/kvbm-frontend.service").read_text())["Service"]
    assert int(service["TimeoutStopSec"]) > FrontendSettings().openai.drain + 10


def _verified(name: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze verify`, with a program that is there in the place of ours."""
    program = shutil.which("true")
    assert program is not None
    lines = [
        f"ExecStart={program} {line.partition(' ')[2]}" if line.startswith("ExecStart=") else line
        for line in text.splitlines()
    ]
    unit = folder / name
    unit.write_text("\n".join(lines) + "\n")
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def _read(text: str) -> ConfigParser:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    return unit
