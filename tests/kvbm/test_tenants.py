"""Tenants: whose engine it is, the daemon's settings say; what is whose, the key says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from kvbm.daemon.settings import DaemonSettings
from kvbm.daemon.tiers import make_tenants
from kvbm.fingerprint import key_of, namespace_of
from kvbm.note import Note, domain_of
from kvbm.protocol import HERE, MISS, FrameError
from kvbm.session import Refusal, Sessions
from kvbm.tenants import Tenant, Tenants, UnknownTenantError
from runtime.settings import SettingsError
from storage_tiers.base import StoreItem, TierName, tenant_of
from storage_tiers.testing import make_items, make_key
from tests.kvbm.builders import CHUNK_BYTES, Node
from tests.kvbm.members import Engine, Peer, commit_of, join_engine, make_hello

MakeNode = Callable[..., Node]
ACME, BETA = Tenant("acme", 7, b"a" * 32), Tenant("beta", 8, b"b" * 32)


def items_of(tenant: Tenant, count: int) -> list[StoreItem]:
    return [
        replace(item, chunk=replace(item.chunk, key=make_key(n, tenant.tag), parent=None))
        for n, item in enumerate(make_items("same", count, CHUNK_BYTES))
    ]


def store(node: Node, engine: Engine, items: Sequence[StoreItem]) -> None:
    slots = engine.lease(len(items))
    for slot, item in zip(slots, items, strict=True):
        node.dram.view(slot)[:] = item.data
    engine.commit(slots, items)


@pytest.fixture
def sessions(node: Node) -> Sessions:
    return Sessions(node.manager, Tenants([ACME, BETA]))


def test_engines_of_one_tenant_share_and_those_of_another_do_not(
    node: Node, sessions: Sessions
) -> None:
    first = join_engine(sessions, "first", tenant="acme")
    second = join_engine(sessions, "second", tenant="acme")
    other = join_engine(sessions, "other", tenant="beta")
    store(node, first, items_of(ACME, 3))
    assert second.match(1, items_of(ACME, 3)) == [HERE] * 3
    assert other.match(1, items_of(BETA, 3)) == [MISS] * 3


def test_another_tenant_s_keys_are_neither_looked_up_nor_stored(
    node: Node, sessions: Sessions
) -> None:
    """An engine that names them breaks the protocol: a salt it has not been given, it cannot use,
    and a tag that it was not given, it may not."""
    thief = join_engine(sessions, "thief", tenant="beta")
    store(node, join_engine(sessions, "owner", tenant="acme"), items_of(ACME, 2))
    with pytest.raises(FrameError, match="another tenant"):
        thief.match(1, [*items_of(BETA, 1), *items_of(ACME, 1)])
    with pytest.raises(FrameError, match="another tenant"):
        store(node, thief, items_of(ACME, 2))


def test_notes_say_whose_kv_it_is_and_another_tenant_s_are_not_taken(
    node: Node, sessions: Sessions
) -> None:
    said = {"worker_id": 5, "dp_rank": 0, "namespace": b"m", "block_tokens": 16, "group": 0}
    scheduler = Peer(make_hello("scheduler", tenant="beta", routing=said))
    worker = Peer(make_hello(tenant="beta"))
    session = sessions.join(scheduler)
    assert sessions.join(worker) is session
    engine = Engine(sessions, scheduler, [worker], session)
    (connected,) = sessions.connected
    assert connected.domain == domain_of(b"m", BETA.salt, BETA.tag)
    hashes = np.array([3], np.uint64)
    for domain, taken in ((connected.domain, True), (domain_of(b"m", ACME.salt, 7), False)):
        items = items_of(BETA, 1)
        commit = commit_of(engine.lease(1), items)
        noted = msgspec.structs.replace(commit, notes=[Note(domain, None, hashes).encode()])
        if taken:
            engine.say(noted)
            assert node.notes.note_of(items[0].chunk.key) == noted.notes[0]
        else:
            with pytest.raises(FrameError, match="note of another tenant"):
                engine.say(noted)
    sessions.leave(worker)
    assert not sessions.connected


@pytest.mark.parametrize(("name", "reason"), [("gamma", "'gamma' is not conf"), ("", "no tenant")])
def test_an_engine_of_no_known_tenant_is_refused_and_told_why(
    sessions: Sessions, name: str, reason: str
) -> None:
    with pytest.raises(Refusal, match=reason):
        join_engine(sessions, tenant=name)


def test_without_tenants_any_engine_is_welcome(node: Node) -> None:
    sessions = Sessions(node.manager)
    engine = join_engine(sessions, tenant="whatever")
    assert (engine.session.tenant.tag, engine.session.tenant.salt) == (0, b"")


def test_the_salt_and_the_tag_make_the_key() -> None:
    namespace = namespace_of({"model": "m"})
    plain = key_of(namespace, b"hash", 0)
    acme = key_of(namespace, b"hash", 0, salt=ACME.salt, tag=ACME.tag)
    beta = key_of(namespace, b"hash", 0, salt=BETA.salt, tag=BETA.tag)
    assert len({plain[:-1], acme[:-1], beta[:-1]}) == 3
    assert [tenant_of(key) for key in (plain, acme, beta)] == [0, 7, 8]


def test_the_settings_make_tenants_with_quotas_and_without_the_salt_itself() -> None:
    settings = DaemonSettings.load(
        environ={},
        overrides={
            "tenants.acme.tag": 7,
            "tenants.acme.salt": "a secret of many letters",
            "tenants.acme.ssd_quota": "1GiB",
            "tenants.beta.tag": 8,
            "tenants.beta.salt": "another one of many letters",
        },
    ).value
    tenants = make_tenants(settings)
    acme = tenants.named("acme")
    assert (acme.tag, acme.quotas) == (7, {TierName.SSD: 1 << 30})
    assert len(acme.salt) == 32 and b"secret" not in acme.salt
    assert tenants.quotas(TierName.SSD) == {7: 1 << 30} and not tenants.quotas(TierName.S3)
    with pytest.raises(UnknownTenantError):
        tenants.named("gamma")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tag": 7, "salt": "short"}, "at least 16"),
        ({"tag": 0, "salt": "x" * 16}, "greater than or equal to 1"),
        ({"tag": 256, "salt": "x" * 16}, "less than or equal to 255"),
        ({"tag": 9, "salt": "x" * 16}, "'beta' and 'acme' have the same tag 9"),
        ({"salt": "x" * 16}, "required here"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, object], reason: str) -> None:
    overrides = {f"tenants.acme.{key}": value for key, value in given.items()}
    beta = {"tenants.beta.tag": 9, "tenants.beta.salt": "y" * 16}
    with pytest.raises(SettingsError, match=reason):
        DaemonSettings.load(environ={}, overrides={**beta, **overrides})
