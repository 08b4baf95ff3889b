"""Which discovery settings choose, what they refuse, and that a fault of a store shows."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from runtime.discovery import DiscoverySettings, create_discovery
from runtime.discovery.leased import LeasedDiscovery
from runtime.discovery.memory import MemoryStore
from runtime.embedded_etcd import EmbeddedEtcd
from tests.runtime.discovery.world import until

ROOT = Path(__file__).parents[3]
CHOOSE = """
import sys
from runtime.discovery import DiscoverySettings, create_discovery
create_discovery(DiscoverySettings(discovery=sys.argv[1]), {"KUBERNETES_SERVICE_HOST": "::1"})
kinds = ("memory", "file", "etcd", "kubernetes")
print(*(kind for kind in kinds if f"runtime.discovery.{kind}" in sys.modules))
print("httpx2" in sys.modules)
"""


@pytest.mark.parametrize("kind", ["memory", "file", "etcd", "kubernetes"])
def test_only_what_is_chosen_is_imported(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, kind], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [kind, str(kind in {"etcd", "kubernetes"})]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"discovery": "zookeeper"}, "etcd"),
        ({"ttl": "100ms"}, "0.5"),
        ({"etcd_url": "127.0.0.1:2379"}, "etcd_url"),
        ({"etcd_url": "http://a:1,b:2"}, "etcd_url: 'b:2'"),
        ({"kubernetes_url": "api"}, "kubernetes_url"),
        ({"etcd_user": "kvbm"}, "go together"),
        ({"kubernetes_namespace": "No/Such"}, "pattern"),
        ({"poll": 1}, "poll"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        DiscoverySettings(**values)  # type: ignore[arg-type]


async def test_two_memory_discoveries_share_a_store_only_if_given_one() -> None:
    settings = DiscoverySettings(discovery="memory")
    alone, other = create_discovery(settings, {}), create_discovery(settings, {})
    for discovery in (alone, other):
        await discovery.start()
    await alone.put("v1/a", b"")
    assert await other.list("") == {}
    for discovery in (alone, other):
        await discovery.close()


async def test_a_store_that_fails_in_no_known_way_shows_in_the_status() -> None:
    class Broken(MemoryStore):
        async def renew(self, lease: str) -> None:
            raise RuntimeError("a fault of the store")

    discovery = LeasedDiscovery(Broken(), 0.1)
    await discovery.start()
    await until(lambda: "a fault of the store" in (discovery.status().error or ""))
    assert not discovery.status().connected
    await discovery.close()


async def test_slow_writes_wait_for_the_renewal_of_the_lease() -> None:
    class Slow(MemoryStore):
        async def put(self, lease: str, key: str, value: bytes) -> None:
            await asyncio.sleep(0.02)
            await super().put(lease, key, value)

    store = Slow()
    discovery = LeasedDiscovery(store, 0.5)
    await discovery.start()
    keys = {f"v1/{number}": b"" for number in range(60)}
    async with asyncio.TaskGroup() as tasks:
        for key in keys:
            tasks.create_task(discovery.put(key, b""))
    assert await store.list("") == keys
    assert discovery.status().lease_losses_total == 0
    await discovery.close()


def test_embedded_servers_choose_their_own_ports(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path / "one") as one, EmbeddedEtcd(tmp_path / "two") as two:
        assert one.port != two.port
        assert one.pid != two.pid
        one.stop()
        one.stop()
        assert one.pid is None
        assert two.pid is not None
