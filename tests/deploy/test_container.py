"""The container file: hadolint judges it, and what it copies, installs and starts is there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.deploy.chart import CHART, ROOT
from tests.deploy.programs import run

DOCKERFILE: Final = ROOT / "deploy/container/Dockerfile"
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: Final = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_hadolint_finds_nothing() -> None:
    found = run("hadolint", "--failure-threshold", "style", DOCKERFILE)
    assert found.returncode == 0, found.stdout
    assert not found.stdout


@pytest.mark.parametrize(
    ("spoilt", "rule"),
    [
        (("-slim-bookworm AS fleet", " AS fleet\nFROM python AS fleet2"), "DL3006"),
        (('CMD ["kvbm", "--help"]', "CMD kvbm --help"), "DL3025"),
        (("RUN pip wheel", "RUN cd /source && pip wheel"), "DL3003"),
    ],
)
def test_hadolint_refuses_what_is_spoilt(
    spoilt: tuple[str, str], rule: str, tmp_path: Path
) -> None:
    text = DOCKERFILE.read_text()
    assert spoilt[0] in text
    (tmp_path / "Dockerfile").write_text(text.replace(*spoilt))
    found = run("hadolint", tmp_path / "Dockerfile")
    assert found.returncode != 0 and rule in found.stdout


def test_what_is_copied_is_there_and_is_all_of_the_wheel() -> None:
    copied = _copied()
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert {path for path in copied if (ROOT / path).is_dir()} == set(PACKAGES)
    assert {"pyproject.toml", PROJECT["project"]["readme"], "LICENSE"} <= copied


def test_what_is_copied_is_not_ignored() -> None:
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == _copied()


def test_images_start_programs_that_are_installed_as_the_chart_s_user() -> None:
    text = DOCKERFILE.read_text()
    commands = [json.loads(found) for found in re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)]
    assert len(commands) == 2
    assert {command[0] for command in commands} <= set(PROJECT["project"]["scripts"])
    user = yaml.safe_load((CHART / "values.yaml").read_text())["user"]
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert users == [f"{user['uid']}:{user['gid']}"] * 2


def test_versions_are_those_that_everything_was_run_with() -> None:
    text, install = DOCKERFILE.read_text(), (ROOT / "tools/install.py").read_text()
    assert _one(r"^ARG VLLM=(.*)$", text) == _one(r'^VLLM_VERSION = "(.*)"$', install)
    for pin in re.findall(r"(?<=\s)nixl[\w-]*==[\w.]+", text):
        assert f'"{pin}"' in install
    assert "--constraint /constraints.txt" in text


def _copied() -> set[str]:
    """Of the repository: the sources of every COPY that is not from another stage."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def _one(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.MULTILINE)
    return str(found)
