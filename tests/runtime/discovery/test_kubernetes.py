"""Discovery in the Kubernetes API: everything that every kind does, and what only it can do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.discovery import Discovery, DiscoverySettings, Written, create_discovery
from runtime.discovery import kubernetes_api as api_module
from runtime.discovery.kubernetes import KubernetesStore
from runtime.server_process import free_ports
from runtime.settings import SettingsError
from tests.runtime.discovery.conformance import Conformance, Surviving
from tests.runtime.discovery.kube_server import KubeServer
from tests.runtime.discovery.world import Members, follow, take_until_synced, until

TTL_S = 2.0


class KubeWorld(Members):
    def __init__(self, server: KubeServer, account: Path) -> None:
        self.server = server
        self.account = account
        account.mkdir()
        (account / "token").write_text(server.token + "\n")
        (account / "namespace").write_text("inference")
        super().__init__(
            DiscoverySettings(
                discovery="kubernetes",
                ttl=TTL_S,
                kubernetes_url=f"http://127.0.0.1:{server.port}",
                kubernetes_account=account,
            )
        )

    async def end_lease(self, member: Discovery) -> None:
        lease = member.status().lease
        assert lease is not None
        self.server.drop("leases", lease)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[KubeWorld]:
    server = KubeServer(free_ports(1)[0], "first-token")
    await server.start()
    world = KubeWorld(server, tmp_path / "account")
    yield world
    await world.close()
    await server.stop()


class TestKubernetes(Conformance, Surviving):
    pass


async def test_where_the_past_is_gone_the_watcher_lists_again(world: KubeWorld) -> None:
    """An API server throws away the past behind a stopped watch: 410, then the differences."""
    writer, reader = await world.join(), await world.join()
    await writer.put("v1/a", b"1")
    await writer.put("v1/b", b"1")
    watch = reader.watch("v1/")
    view = await take_until_synced(watch)
    world.server.forget_past()
    await writer.put("v1/a", b"2")
    await writer.delete("v1/b")
    world.server.forget_past()
    await writer.put("v1/c", b"3")
    expected = {"v1/a": b"2", "v1/c": b"3"}
    assert await follow(watch, view, lambda _, seen: seen == expected) == expected
    assert world.server.gone_total > 0
    assert reader.status().relists_total > 0


async def test_bookmarks_keep_a_quiet_watch_fresh(
    world: KubeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ConfigMaps do not change while Leases do; the past of both is then forgotten."""
    monkeypatch.setattr(api_module, "WATCH_S", 1)
    writer, reader = await world.join(), await world.join()
    await writer.put("v1/a", b"1")
    watch = reader.watch("v1/")
    view = await take_until_synced(watch)
    opened = world.server.watches_total
    await until(lambda: world.server.watches_total >= opened + 2)  # both were opened anew
    assert world.server.bookmarks_total > 0
    await writer.put("v1/b", b"2")
    await follow(watch, view, lambda _, seen: len(seen) == 2)
    assert reader.status().relists_total == 0


async def test_a_server_that_is_away_ends_nobody(world: KubeWorld) -> None:
    writer, reader = await world.join(), await world.join()
    await writer.put("v1/a", b"1")
    watch = reader.watch("v1/")
    view = await take_until_synced(watch)
    await world.server.stop()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(watch), 1.25 * TTL_S)
    await world.server.start()
    await writer.put("v1/b", b"2")
    expected = {"v1/a": b"1", "v1/b": b"2"}
    assert await follow(watch, view, lambda _, seen: seen == expected) == expected


async def test_what_the_dead_left_is_deleted_by_watchers(world: KubeWorld) -> None:
    dead = KubernetesStore(world.settings, {})
    lease = await dead.grant(1)
    await dead.put(lease, "v1/dead", b"")
    await dead.close()
    reader = await world.join()
    watch = reader.watch("v1/")
    await until(lambda: not any(key[2] == lease for key in world.server.objects))
    assert not any(key[1] == "configmaps" for key in world.server.objects)
    watch.close()


async def test_a_replaced_token_is_used_at_once(world: KubeWorld) -> None:
    member = await world.join()
    assert await member.put("v1/a", b"1") == Written()
    world.server.token = "second-token"
    await until(lambda: "401" in (member.status().error or ""))
    (world.account / "token").write_text("second-token")
    assert await member.put("v1/a", b"2") == Written()
    assert {key[0] for key in world.server.objects} == {"inference"}


async def test_objects_of_others_with_our_label_are_skipped(world: KubeWorld) -> None:
    member = await world.join()
    await member.put("v1/a", b"1")
    labels = {"kvbm.io/discovery": "v1"}
    for plural, name in (("configmaps", "odd"), ("leases", "odd")):
        item = {"metadata": {"name": name, "labels": labels}, "spec": {"renewTime": "never"}}
        world.server._create(("inference", plural, name), item)
    assert await member.list("v1/") == {"v1/a": b"1"}
    assert member.status().skipped_total == 2


def test_outside_of_a_pod_the_settings_must_say_where_to_go(tmp_path: Path) -> None:
    settings = DiscoverySettings(discovery="kubernetes", kubernetes_account=tmp_path)
    with pytest.raises(SettingsError, match="kubernetes_url"):
        create_discovery(settings, {})
    inside = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert api_module._in_cluster(inside) == "https://[fd00::1]:6443"
