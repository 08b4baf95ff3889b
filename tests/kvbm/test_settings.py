"""The daemon's settings: defaults that start, cross checks, and documentation without drift."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvbm.address import default_socket
from kvbm.daemon.settings import DaemonSettings, config_page, main
from runtime.settings import SettingsError
from runtime.settings_docs import describe

ROOT = Path(__file__).parents[2]
S3 = {"s3.bucket": "kv-cache"}


def failure(**overrides: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load({key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


def load(overrides: dict[str, object]) -> DaemonSettings:
    return DaemonSettings.load(environ={}, overrides=overrides).value


def test_nothing_need_be_set() -> None:
    settings = load({})
    assert settings.ssd is None
    assert settings.s3 is None
    assert settings.events.plane == "none"
    assert settings.admin.host == "127.0.0.1"
    assert settings.node


def test_the_socket_is_in_the_runtime_directory_of_systemd_first() -> None:
    assert default_socket({"RUNTIME_DIRECTORY": "/run/kvbm:/run/b"}, 7) == Path(
        "/run/kvbm/kvbm.sock"
    )
    assert default_socket({}, 987654321) == Path("/tmp/kvbm-987654321/kvbm.sock")


def test_credentials_are_secrets() -> None:
    settings = load({**S3, "s3.access_key_id": "AKIA", "s3.secret_access_key": "verysecret"})
    assert settings.s3 is not None
    assert "verysecret" not in repr(settings)
    assert "verysecret" not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"s3__bucket": "kv"},
            "s3.bucket (from override): 'kv' has 2 characters; accepted: 3 to 63",
        ),
        ({"s3__bucket": "Has_Caps"}, "is no bucket name; accepted: lower-case"),
        ({"ssd__path": "/s", "ssd__capacity": "1MiB"}, "67108864"),
        ({"ssd__path": "/s"}, "ssd.capacity (from override): required here: Most that may"),
        ({"s3__bucket": "abc", "s3__access_key_id": "A"}, "go together: both or neither"),
        ({"s3__bucket": "abc", "s3__capacity": "1MiB"}, "capacity 1MiB does not hold one object"),
        ({"s3__bucket": "abc", "s3__endpoint_url": "host:1"}, "neither http:// nor https://"),
        ({"s3__bucket": "abc", "s3__prefix": "/a"}, "must not begin with a slash"),
        (
            {"dram__capacity": "256MiB", "onboard__max_bytes_in_flight": "512MiB"},
            "onboard.max_bytes_in_flight 512MiB is more than",
        ),
        ({"offload__queue_chunks": 8}, "queue_chunks 8 is less than batch_chunks 256"),
        ({"lease__fraction": 1.5}, "lease.fraction (from override): 1.5 is not accepted"),
        ({"socket": "/" + "x" * 200}, "longer than 107 bytes"),
        ({"admin__port": 70000}, "70000 is not accepted; should be less than or equal to 65535"),
        ({"events__plane": "kafka"}, "accepted: 'nats', 'zmq', 'memory' or 'none'"),
        ({"events__nats_url": "localhost"}, "is no NATS URL; accepted: nats://HOST:PORT"),
        ({"requests__nats_url": "localhost"}, "is no NATS URL; accepted: nats://HOST:PORT"),
        ({"events__nats_user": "u"}, "nats_user and nats_password go together"),
        ({"node": "a.b"}, "node (from override)"),
        ({"admin__host": "0.0.0.0"}, "is no loopback address, so that others could reach"),
        ({"events__nats_embedded": True}, "needs plane nats"),
        ({"events__nats_embedded": True, "events__plane": "nats"}, "needs nats_user"),
        ({"admin__host": "node-1.example"}, "set admin.token"),
        ({"admin__token": "short"}, "at least 8 characters of ASCII without spaces"),
        ({"admin__token": "file:/nonexistent/token"}, "/nonexistent/token cannot be read"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_reason(
    overrides: dict[str, object], reason: str
) -> None:
    assert reason in failure(**overrides)


def test_the_admin_api_leaves_the_node_only_with_a_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a-token-of-16-up\n")
    admin = load({"admin.host": "0.0.0.0", "admin.token": f"file:{file}"}).admin
    assert admin.token_text == "a-token-of-16-up"
    assert "a-token-of-16-up" not in repr(admin)
    for host in ("localhost", "127.0.0.9", "::1"):
        assert load({"admin.host": host}).admin.token_text is None


def test_a_prefix_ends_in_a_slash() -> None:
    settings = load({**S3, "s3.prefix": "team/a"})
    assert settings.s3 is not None
    assert settings.s3.prefix == "team/a/"


def test_the_example_is_accepted() -> None:
    settings = DaemonSettings.load(ROOT / "deploy/kvbm.example.yaml", environ={}).value
    assert settings.dram.capacity == 64 << 30
    assert settings.ssd is not None
    assert settings.s3 is not None


def test_every_setting_says_what_it_means() -> None:
    for group in describe(DaemonSettings):
        for row in group.rows:
            assert row.description.endswith("."), row.key


def test_the_documentation_is_that_of_the_code() -> None:
    page = (ROOT / "docs/CONFIG.md").read_text()
    assert page == config_page(), "run: python -m kvbm.daemon.settings > docs/CONFIG.md"


def test_a_file_is_checked_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "kvbm.yaml"
    file.write_text("dram: {capcity: 1GiB}\n")
    assert main([str(ROOT / "deploy/kvbm.example.yaml")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "kvbm.daemon.settings", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean 'capacity'?" in done.stderr


def test_what_the_kvbm_command_reads_is_no_unknown_variable() -> None:
    environ = {"KVBM_ADMIN_URL": "http://127.0.0.1:1", "KVBM_ADMIN_TOKEN": "x", "KVBM_PORT": "1"}
    assert DaemonSettings.load(environ=environ).ignored == ("KVBM_PORT",)


def test_settings_of_a_router_in_the_same_environment_are_not_the_daemons() -> None:
    environ = {"KVBM_ROUTER_HTTP__PORT": "9480", "KVBM_NODE": "n7"}
    loaded = DaemonSettings.load(environ=environ)
    assert loaded.value.node == "n7" and loaded.ignored == ()
