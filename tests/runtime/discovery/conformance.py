"""What every kind of discovery does; each kind's test file runs all of it.

Subclass `Conformance` with a fixture `world`, and `Surviving` too where programs may be killed.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from pathlib import Path

import pytest

from runtime.discovery import Deleted, Put, Synced, Written
from runtime.discovery.base import VALUE_BYTES_MAX, ValueRefused
from tests.runtime.discovery.world import (
    WAIT_S,
    World,
    follow,
    take,
    take_until_synced,
    until,
    until_true,
)

ROOT = Path(__file__).parents[3]


class Conformance:
    async def test_what_is_put_is_listed_and_watched_in_order(self, world: World) -> None:
        writer, reader = await world.join(), await world.join()
        watch = reader.watch("v1/")
        assert await take(watch) == Synced()
        assert await writer.put("v1/a/1", b"one") == Written()
        assert await take(watch) == Put("v1/a/1", b"one")
        assert await writer.put("v1/a/2", b"two") == Written()
        assert await take(watch) == Put("v1/a/2", b"two")
        assert await writer.put("v1/a/1", b"other") == Written()
        assert await take(watch) == Put("v1/a/1", b"other")
        assert await reader.list("v1/") == {"v1/a/1": b"other", "v1/a/2": b"two"}
        assert await writer.delete("v1/a/2") == Written()
        assert await take(watch) == Deleted("v1/a/2")
        assert await reader.list("v1/") == {"v1/a/1": b"other"}
        assert writer.status().registered == 1
        assert writer.status().pending == 0

    async def test_a_watch_begins_with_all_there_is(self, world: World) -> None:
        writer, reader = await world.join(), await world.join()
        for number in range(20):
            await writer.put(f"v1/{number}", b"%d" % number)
        expected = {f"v1/{number}": b"%d" % number for number in range(20)}
        assert await take_until_synced(reader.watch("v1/")) == expected
        assert await take_until_synced(reader.watch("")) == expected

    async def test_a_prefix_is_a_level_and_namespaces_are_isolated(self, world: World) -> None:
        member = await world.join()
        mine, other = member.watch("v1/prod/"), member.watch("v1/prod2/")
        for key in ("v1/prod/x", "v1/prod2/x", "v1/prod", "v1/prod/x/y", "v1/prod%2Fx"):
            assert await member.put(key, key.encode()) == Written()
        expected = {"v1/prod/x": b"v1/prod/x", "v1/prod/x/y": b"v1/prod/x/y"}
        assert await member.list("v1/prod/") == expected
        assert await follow(mine, {}, lambda _, view: len(view) == 2) == expected
        assert await follow(other, {}, lambda _, view: len(view) == 1) == {
            "v1/prod2/x": b"v1/prod2/x"
        }

    async def test_what_a_closed_program_put_is_gone_at_once(self, world: World) -> None:
        leaving, staying = await world.join(), await world.join()
        await leaving.put("v1/a", b"1")
        await leaving.put("v1/b", b"2")
        await staying.put("v1/c", b"3")
        watch = staying.watch("v1/")
        assert len(await take_until_synced(watch)) == 3
        await leaving.close()
        assert await staying.list("v1/") == {"v1/c": b"3"}
        assert {await take(watch), await take(watch)} == {Deleted("v1/a"), Deleted("v1/b")}

    async def test_a_key_belongs_to_who_put_it_last(self, world: World) -> None:
        first, second = await world.join(), await world.join()
        await first.put("v1/k", b"first")
        await second.put("v1/k", b"second")
        await first.delete("v1/k")
        assert await second.list("v1/") == {"v1/k": b"second"}
        await first.put("v1/other", b"")
        await first.close()
        assert await second.list("v1/") == {"v1/k": b"second"}
        await second.delete("v1/k")
        assert await second.list("v1/") == {}

    async def test_bad_keys_prefixes_and_values_are_refused(self, world: World) -> None:
        member = await world.join()
        for key in ("", "/", "a//b", "../a", "a/..", "a/.", "a b", "a\n", "ä", "a/", "a" * 201):
            with pytest.raises(ValueRefused):
                await member.put(key, b"")
        for key in ("x/" * 600 + "x",):
            with pytest.raises(ValueRefused, match="longer"):
                await member.put(key, b"")
        with pytest.raises(ValueRefused, match="end in '/'"):
            await member.list("v1")
        with pytest.raises(ValueRefused):
            member.watch("v1")
        with pytest.raises(ValueRefused, match=str(VALUE_BYTES_MAX)):
            await member.put("a", bytes(VALUE_BYTES_MAX + 1))
        assert await member.list("") == {}
        assert member.status().registered == 0

    async def test_any_bytes_are_kept_as_they_are(self, world: World) -> None:
        writer, reader = await world.join(), await world.join()
        values = {
            "v1/empty": b"",
            "v1/all": bytes(range(256)),
            "v1/large": random.Random(5).randbytes(VALUE_BYTES_MAX),
            "v1/" + "~" * 200: b"long segment",
        }
        for key, value in values.items():
            assert await writer.put(key, value) == Written()
        assert await reader.list("v1/") == values
        assert await take_until_synced(reader.watch("v1/")) == values

    async def test_a_lost_lease_is_replaced_and_everything_put_again(self, world: World) -> None:
        writer, reader = await world.join(), await world.join()
        await writer.put("v1/a", b"1")
        await writer.put("v1/b", b"2")
        watch = reader.watch("v1/")
        view = await take_until_synced(watch)
        before = writer.status()
        await world.end_lease(writer)
        await until(lambda: writer.status().lease_losses_total == 1)
        await until(lambda: writer.status().lease is not None and not writer.status().pending)
        after = writer.status()
        assert after.lease != before.lease
        assert after.reregistered_total == 2
        await writer.put("v1/c", b"3")
        expected = {"v1/a": b"1", "v1/b": b"2", "v1/c": b"3"}
        assert await reader.list("v1/") == expected
        assert await follow(watch, view, lambda _, seen: seen == expected) == expected

    async def test_leases_are_kept_alive_for_as_long_as_needed(self, world: World) -> None:
        writer, reader = await world.join(), await world.join()
        await writer.put("v1/a", b"1")
        watch = reader.watch("v1/")
        await take_until_synced(watch)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(watch), 1.5 * world.settings.ttl)
        assert await reader.list("v1/") == {"v1/a": b"1"}
        assert writer.status().lease_losses_total == 0

    async def test_a_slow_watcher_misses_nothing_that_is_still_true(self, world: World) -> None:
        writer, reader = await world.join(), await world.join()
        watch = reader.watch("v1/")
        await take_until_synced(watch)
        for number in range(50):
            await writer.put("v1/a", b"%d" % number)
            await writer.put(f"v1/gone/{number}", b"")
            await writer.delete(f"v1/gone/{number}")
        await writer.put("v1/last", b"")
        expected = {"v1/a": b"49", "v1/last": b""}
        assert await follow(watch, {}, lambda _, view: view == expected) == expected

    async def test_a_watch_holds_no_more_than_its_limit(self, world: World) -> None:
        writer, reader = await world.join(), await world.join()
        for number in range(8):
            await writer.put(f"v1/{number}", b"")
        watch = reader.watch("v1/", limit=5)
        held = await take_until_synced(watch)
        assert len(held) == 5
        assert reader.status().watch_dropped_total >= 3
        for key in list(held):
            await writer.delete(key)
        missing = {f"v1/{number}" for number in range(8)} - set(held)
        view = await follow(watch, held, lambda _, view: set(view) == missing)
        assert len(view) == 3

    async def test_closing_ends_watches_and_may_be_repeated(self, world: World) -> None:
        member = await world.join()
        watch, closed = member.watch("v1/"), member.watch("v1/")
        await take_until_synced(watch)
        closed.close()
        closed.close()
        assert member.status().watches == 1
        await member.close()
        await member.close()
        async with asyncio.timeout(WAIT_S):
            assert [event async for event in watch] == []
        assert not member.status().connected
        assert member.status().watches == 0

    async def test_random_work_of_three_programs_ends_in_one_truth(self, world: World) -> None:
        seed = 20
        chance = random.Random(seed)
        members = [await world.join() for _ in range(3)]
        watch = members[0].watch("v1/")
        truth: dict[str, bytes] = {}

        async def work(number: int) -> None:
            for step in range(40):
                key = f"v1/{number}/{chance.randrange(6)}"
                if chance.random() < 0.4:
                    truth.pop(key, None)
                    await members[number].delete(key)
                else:
                    truth[key] = value = b"%d" % step
                    await members[number].put(key, value)
                if step == 20:
                    await world.end_lease(members[number])

        await asyncio.gather(*(work(number) for number in range(3)))
        await until(lambda: not any(member.status().pending for member in members))

        async def agrees() -> bool:
            return await members[1].list("v1/") == truth

        await until_true(agrees)
        assert await follow(watch, {}, lambda _, view: view == truth) == truth, seed


class Surviving:
    """For kinds that programs of several processes can share."""

    async def test_what_a_killed_program_put_is_gone_after_its_time(self, world: World) -> None:
        reader = await world.join()
        watch = reader.watch("v1/")
        await take_until_synced(watch)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.runtime.discovery.registering_child"),
            world.settings.model_dump_json(exclude={"etcd_password"}),
            "v1/child",
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), **world.environ},
        )
        try:
            assert await take(watch) == Put("v1/child", str(child.pid).encode())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(watch), world.settings.ttl)
            child.send_signal(signal.SIGKILL)
            await child.wait()
            assert await take(watch) == Deleted("v1/child")
            assert await reader.list("v1/") == {}
        finally:
            if child.returncode is None:
                child.kill()
            await child.wait()

    async def test_a_program_that_stood_still_comes_back(self, world: World) -> None:
        """Stopped for longer than its lease: gone for others, and registered again by itself."""
        reader = await world.join()
        watch = reader.watch("v1/")
        await take_until_synced(watch)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.runtime.discovery.registering_child"),
            world.settings.model_dump_json(exclude={"etcd_password"}),
            "v1/child",
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), **world.environ},
        )
        try:
            put = Put("v1/child", str(child.pid).encode())
            assert await take(watch) == put
            child.send_signal(signal.SIGSTOP)
            assert await take(watch) == Deleted("v1/child")
            child.send_signal(signal.SIGCONT)
            assert await take(watch) == put
        finally:
            child.kill()
            await child.wait()
