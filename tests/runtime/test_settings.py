"""Layers, origins and error messages of runtime.settings, on a small model of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from runtime.settings import Section, Settings, SettingsError, load, parse_assignments
from runtime.settings_docs import describe
from runtime.units import (
    Duration,
    Secret,
    Size,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


class Disk(Section):
    path: str = Field(description="Where.")
    capacity: Size = Field(default=1 << 20, ge=1024, description="How much.")
    mode: Literal["fast", "safe"] = Field(default="safe", description="How.")


class Login(Section):
    password: Secret | None = Field(default=None, description="Secret.")


class Example(Settings):
    name: str = Field(default="n", description="Name.")
    wait: Duration = Field(default=1.0, description="Time.")
    disk: Disk | None = Field(default=None, description="Disk.")
    login: Login = Field(default=Login(), description="Login.")


def failure(**layers: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load(Example, **layers)  # type: ignore[arg-type]
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- units --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("64GiB", 64 << 30),
        ("1.5 MiB", 3 << 19),
        ("2TB", 2 * 10**12),
        (7, 7),
        ("77", 77),
        ("4Gi", 4 << 30),
    ],
)
def test_a_size_is_read_in_binary_and_decimal_units(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["64G", "-1", -2, "GiB", "", True, "1e3", "1.0001KiB", 0.5, float("nan")]
)
def test_what_is_no_size_is_refused_and_told_what_is(text: object) -> None:
    with pytest.raises(ValueError, match="accepted: a whole number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [("250ms", 0.25), ("5s", 5), (2, 2), ("0.5", 0.5), ("7d", 604800), ("0", 0)],
)
def test_a_duration_is_read_in_any_unit(text: object, duration_s: float) -> None:
    assert parse_duration(text) == pytest.approx(duration_s)


@pytest.mark.parametrize("text", ["5 parsecs", "-5s", -1, "", None])
def test_what_is_no_duration_is_refused_and_told_what_is(text: object) -> None:
    with pytest.raises(ValueError, match="accepted: a number of seconds"):
        parse_duration(text)


@given(st.integers(0, 1 << 60))
def test_a_size_survives_formatting_and_parsing(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(1, 10**7))
def test_a_duration_survives_formatting_and_parsing(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(
        milliseconds / 1000, rel=1e-4
    )


# -- layers -------------------------------------------------------------------------------


def test_later_layers_win_and_every_key_has_an_origin(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "name: file\nwait: 2\ndisk: {path: /file, mode: fast}\n")
    environ = {"KVBM_DISK__PATH": "/environ", "KVBM_WAIT": "250ms", "PATH": "/bin"}
    loaded = load(Example, file=file, environ=environ, overrides={"disk.capacity": "2KiB"})
    assert loaded.value.name == "file"
    assert loaded.value.wait == 0.25
    assert loaded.value.disk == Disk(path="/environ", capacity=2048, mode="fast")
    assert loaded.origins["name"] == str(file)
    assert loaded.origins["wait"] == "environment KVBM_WAIT"
    assert loaded.origins["disk.path"] == "environment KVBM_DISK__PATH"
    assert loaded.origins["disk.mode"] == str(file)
    assert loaded.origins["disk.capacity"] == "override"


def test_toml_is_read_by_its_suffix(tmp_path: Path) -> None:
    file = write(tmp_path / "s.toml", 'wait = "5s"\n[disk]\npath = "/t"\n')
    loaded = load(Example, file=file)
    assert loaded.value.wait == 5
    assert loaded.value.disk is not None


def test_nothing_is_read_from_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBM_NAME", "process")
    assert load(Example, environ={}).value.name == "n"
    assert Example().name == "n"


def test_a_section_may_come_as_json_in_one_variable() -> None:
    loaded = load(Example, environ={"KVBM_DISK": '{"path": "/j", "capacity": "1MiB"}'})
    assert loaded.value.disk == Disk(path="/j", capacity=1 << 20)
    assert loaded.origins["disk.path"] == "environment KVBM_DISK"


def test_null_turns_a_section_off_again(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "disk: {path: /file}\n")
    assert load(Example, file=file, environ={"KVBM_DISK": "null"}).value.disk is None
    assert load(Example, file=file, overrides=parse_assignments(["disk=null"])).value.disk is None


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(Example, file=write(tmp_path / "s.yaml", "# nothing\n")).value == Example()


def test_a_secret_is_read_from_its_file_and_never_shown(tmp_path: Path) -> None:
    file = write(tmp_path / "password", "hunter2\n")
    loaded = load(Example, overrides={"login.password": f"file:{file}"})
    password = loaded.value.login.password
    assert password is not None
    assert password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(loaded.value)


def test_variables_of_kubernetes_services_are_no_settings() -> None:
    loaded = load(Example, environ={"KVBM_PORT": "tcp://10.0.0.1:80", "KVBM_SERVICE_HOST": "x"})
    assert loaded.ignored == ("KVBM_PORT", "KVBM_SERVICE_HOST")


# -- errors -------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_with_key_origin_and_what_is_accepted(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", "nmae: x\ndisk: {capacty: 1, mode: slow}\n")
    message = failure(file=file, environ={"KVBM_WAIT": "soon"}, overrides={"disk.capacity": "10"})
    assert "6 problems" in message
    assert f"nmae (from {file}): unknown key, did you mean 'name'? accepted here: name" in message
    assert f"disk.capacty (from {file}): unknown key, did you mean 'capacity'?" in message
    assert f"disk.path (from {file}): required here: Where." in message
    assert f"disk.mode (from {file}): 'slow' is not accepted; accepted: 'fast' or 'safe'" in message
    assert "wait (from environment KVBM_WAIT): 'soon' is not a duration; accepted:" in message


def test_a_bound_that_is_not_kept_is_told() -> None:
    message = failure(overrides={"disk.path": "/p", "disk.capacity": "10"})
    assert "disk.capacity (from override): 10 is not accepted; should be greater" in message
    assert "1024" in message


def test_a_misspelt_variable_is_an_error() -> None:
    assert "KVBM_DISC__PATH (from environment): unknown setting, did you mean 'disk'?" in failure(
        environ={"KVBM_DISC__PATH": "/x"}
    )
    assert "KVBM_NAMES (from environment): unknown setting, did you mean 'name'?" in failure(
        environ={"KVBM_NAMES": "x"}
    )
    assert (
        "disk.pth (from environment KVBM_DISK__PTH): unknown key, did you mean 'path'?"
        in failure(environ={"KVBM_DISK__PTH": "/x"})
    )
    assert "name has no keys of its own" in failure(environ={"KVBM_NAME__X": "1"})


def test_a_section_that_is_no_mapping_is_told() -> None:
    assert "accepted: a section with the keys path, capacity, mode" in failure(
        overrides={"disk": "64GiB"}
    )
    assert "must be a JSON object" in failure(environ={"KVBM_LOGIN": "x"})


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("s.yaml", "a: [", "not well-formed"),
        ("s.toml", "a = ", "not well-formed"),
        ("s.yaml", "- a\n- b\n", "holds a list"),
        ("s.json", '{"a": ', "not well-formed"),
        ("s.ini", "{}", "suffix '.ini' is not known"),
        ("s.yaml", "\udce4", "not well-formed"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert reason in failure(file=file)
    assert str(file) in failure(file=file)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert "No such file" in failure(file=tmp_path / "absent.yaml")


def test_a_secret_is_not_shown_in_errors(tmp_path: Path) -> None:
    message = failure(overrides={"login.password": ["hunter2"], "wait": "x"})
    assert "login.password" in message
    assert "hunter2" not in message
    assert "cannot be read" in failure(overrides={"login.password": f"file:{tmp_path}/absent"})


def test_an_assignment_without_a_value_is_told() -> None:
    with pytest.raises(SettingsError, match="not KEY=VALUE"):
        parse_assignments(["disk.path"])


def test_settings_are_described_with_type_default_and_variable() -> None:
    root, disk, login = describe(Example)
    assert [row.key for row in root.rows] == ["name", "wait"]
    assert disk.optional
    assert not login.optional
    capacity = disk.rows[1]
    assert (capacity.type, capacity.default) == ("size", "`1MiB`")
    assert capacity.variable == "KVBM_DISK__CAPACITY"
    assert disk.rows[2].type == "`fast` or `safe`"
    assert login.rows[0].type == "secret or `null`"
