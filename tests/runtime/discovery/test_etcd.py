"""Discovery in a real etcd: everything that every kind does, and etcd's own failures."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr

from runtime.discovery import (
    Discovery,
    DiscoverySettings,
    DiscoveryUnavailable,
    Pending,
    Written,
    create_discovery,
)
from runtime.discovery import etcd as etcd_module
from runtime.discovery import leased as leased_module
from runtime.embedded_etcd import EmbeddedEtcd
from runtime.server_process import free_ports
from tests.plain_http import PLAIN
from tests.runtime.discovery.conformance import Conformance, Surviving
from tests.runtime.discovery.world import Members, follow, take_until_synced, until

TTL_S = 2.0  # the least that etcd grants


class EtcdWorld(Members):
    def __init__(self, server: EmbeddedEtcd) -> None:
        self.server = server
        super().__init__(DiscoverySettings(discovery="etcd", ttl=TTL_S, etcd_url=server.url))

    def ask(self, path: str, body: dict[str, object]) -> dict[str, object]:
        response = httpx2.post(
            f"{self.server.url}{path}", json=body, trust_env=False, timeout=10, verify=PLAIN
        )
        assert response.status_code == 200, response.text
        answer: dict[str, object] = response.json()
        return answer

    async def end_lease(self, member: Discovery) -> None:
        lease = member.status().lease
        assert lease is not None
        self.ask("/v3/lease/revoke", {"ID": str(int(lease, 16))})

    def clear(self) -> None:
        everything = b64encode(b"\0").decode()
        self.ask("/v3/kv/deleterange", {"key": everything, "range_end": everything})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
async def world(shared: EmbeddedEtcd) -> AsyncIterator[EtcdWorld]:
    world = EtcdWorld(shared)
    yield world
    await world.close()
    world.clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedEtcd]:
    """One of the test's own, on a fixed port, to be stopped and started; the test starts it."""
    server = EmbeddedEtcd(tmp_path / "own", port=free_ports(1)[0])
    yield server
    server.stop()


@pytest.fixture
async def own(server: EmbeddedEtcd) -> AsyncIterator[EtcdWorld]:
    world = EtcdWorld(server)
    yield world
    await world.close()


class TestEtcd(Conformance, Surviving):
    pass


async def test_a_restarted_server_keeps_leases_and_watchers_go_on(own: EtcdWorld) -> None:
    own.server.start()
    writer, reader = await own.join(), await own.join()
    await writer.put("v1/a", b"1")
    watch = reader.watch("v1/")
    view = await take_until_synced(watch)
    own.server.stop()
    own.server.start()
    await writer.put("v1/b", b"2")
    expected = {"v1/a": b"1", "v1/b": b"2"}
    assert await follow(watch, view, lambda _, seen: seen == expected) == expected
    assert await reader.list("v1/") == expected


async def test_a_server_that_lost_everything_is_given_everything_again(
    own: EtcdWorld, tmp_path: Path
) -> None:
    own.server.start()
    writer, other, reader = await own.join(), await own.join(), await own.join()
    await writer.put("v1/a", b"1")
    await other.put("v1/other", b"")
    watch = reader.watch("v1/")
    view = await take_until_synced(watch)
    await other.delete("v1/other")
    own.server.stop()
    shutil.rmtree(tmp_path / "own" / "data")
    assert isinstance(await _put_soon(writer, "v1/b", b"2"), Pending)
    own.server.start()
    expected = {"v1/a": b"1", "v1/b": b"2"}
    await until(lambda: writer.status().lease_losses_total == 1)
    await until(lambda: writer.status().pending == 0 and writer.status().connected)
    assert await follow(watch, view, lambda _, seen: seen == expected) == expected
    assert await reader.list("v1/") == expected


async def test_a_program_may_start_before_its_server(own: EtcdWorld) -> None:
    member = await own.join()
    assert isinstance(await _put_soon(member, "v1/a", b"1"), Pending)
    watch = member.watch("v1/")
    assert not member.status().connected
    assert own.server.url in (member.status().error or "")
    with pytest.raises(DiscoveryUnavailable):
        await member.list("v1/")
    own.server.start()
    await until(lambda: member.status().pending == 0)
    assert await take_until_synced(watch) in ({}, {"v1/a": b"1"})
    assert await member.list("v1/") == {"v1/a": b"1"}
    assert member.status().error is None


async def test_a_server_that_stands_still_is_survived(own: EtcdWorld) -> None:
    """The connection stays open and nothing comes: as when the network drops packets."""
    own.server.start()
    writer, reader = await own.join(), await own.join()
    await writer.put("v1/a", b"1")
    watch = reader.watch("v1/")
    view = await take_until_synced(watch)
    assert own.server.pid is not None
    os.kill(own.server.pid, signal.SIGSTOP)
    try:
        assert isinstance(await _put_soon(writer, "v1/a", b"2"), Pending)
        await until(lambda: not writer.status().connected)
    finally:
        os.kill(own.server.pid, signal.SIGCONT)
    await until(lambda: writer.status().pending == 0)
    assert await follow(watch, view, lambda _, seen: seen == {"v1/a": b"2"}) == {"v1/a": b"2"}


async def test_a_silent_watch_opens_itself_anew_without_missing_anything(
    world: EtcdWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_module, "WATCH_SILENCE_S", 0.05)
    writer, reader = await world.join(), await world.join()
    watch = reader.watch("v1/")
    view = await take_until_synced(watch)
    for number in range(12):
        await writer.put(f"v1/{number}", b"%d" % number)
        await asyncio.sleep(0.06 * (number % 2))
    await follow(watch, view, lambda _, seen: len(seen) == 12)
    assert reader.status().relists_total == 0


async def test_a_watch_of_a_compacted_past_begins_anew(world: EtcdWorld) -> None:
    """The watcher's server is away while what it missed is thrown away."""
    writer, reader = await world.join(), await world.join()
    await writer.put("v1/a", b"1")
    store = etcd_module.EtcdStore(world.settings)
    changes = store.watch("v1/")
    await anext(changes)  # the listing; the watch opens with the next step
    for number in range(5):
        await writer.put("v1/a", b"%d" % number)
    answer = world.ask("/v3/kv/range", {"key": b64encode(b"x").decode()})
    header = answer["header"]
    assert isinstance(header, dict)
    world.ask("/v3/kv/compaction", {"revision": header["revision"], "physical": True})
    with pytest.raises(DiscoveryUnavailable, match="too old a revision"):
        await anext(changes)
    await store.close()
    assert await take_until_synced(reader.watch("v1/")) == {"v1/a": b"4"}


async def test_many_writes_cost_no_lease_and_long_listings_are_whole(world: EtcdWorld) -> None:
    """The writes may take longer than the lease lives; the listing has several pages."""
    member = await world.join()
    keys = {f"v1/{number}": b"" for number in range(2 * etcd_module.PAGE_KEYS + 1)}
    async with asyncio.TaskGroup() as tasks:
        for key in keys:
            tasks.create_task(member.put(key, b""))
    await until(lambda: member.status().pending == 0)
    assert member.status().lease_losses_total == 0
    assert await member.list("v1/") == keys
    assert await take_until_synced(member.watch("v1/")) == keys


async def test_keys_of_others_are_skipped(world: EtcdWorld) -> None:
    member = await world.join()
    for key in (b"v1/sp ace", b"v1/\xff", b"v1//x"):
        world.ask("/v3/kv/put", {"key": b64encode(key).decode(), "value": ""})
    await member.put("v1/a", b"")
    assert await member.list("v1/") == {"v1/a": b""}
    assert member.status().skipped_total == 3


async def test_of_several_servers_one_that_answers_is_enough(world: EtcdWorld) -> None:
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    world.settings = DiscoverySettings(
        discovery="etcd", ttl=TTL_S, etcd_url=f"{dead}, {world.server.url}/"
    )
    member = await world.join()
    assert await member.put("v1/a", b"") == Written()


async def test_users_are_known_by_their_password(own: EtcdWorld) -> None:
    own.server.start()
    for name in ("root", "kvbm"):
        own.ask("/v3/auth/user/add", {"name": name, "password": "secret"})
        own.ask("/v3/auth/role/add", {"name": name})
        own.ask("/v3/auth/user/grant", {"user": name, "role": name})
    everything = {"key": b64encode(b"\0").decode(), "range_end": b64encode(b"\0").decode()}
    own.ask("/v3/auth/role/grant", {"name": "kvbm", "perm": {"permType": 2, **everything}})
    own.ask("/v3/auth/enable", {})

    def member(password: str) -> Discovery:
        settings = DiscoverySettings(
            discovery="etcd",
            ttl=TTL_S,
            etcd_url=own.server.url,
            etcd_user="kvbm",
            etcd_password=SecretStr(password),
        )
        return create_discovery(settings, {})

    known, stranger = member("secret"), member("wrong")
    for each in (known, stranger):
        await each.start()
        own.members.append(each)
    assert await known.put("v1/a", b"1") == Written()
    watch = known.watch("v1/")
    assert await take_until_synced(watch) == {"v1/a": b"1"}
    await until(lambda: "authentication failed" in (stranger.status().error or ""))
    with pytest.raises(DiscoveryUnavailable):
        await stranger.list("v1/")


async def _put_soon(member: Discovery, key: str, value: bytes) -> Written | Pending:
    """`put`, with less patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leased_module, "WRITE_WAIT_S", 0.1)
        return await member.put(key, value)
