"""What a watch tells, against a model: whoever applies it in order has the truth in the end."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from runtime.discovery import Deleted, Put, Synced, Watch

KEYS = st.sampled_from(["a", "b", "c", "d"])
VALUES = st.sampled_from([b"1", b"2"])
STEPS = st.one_of(
    st.tuples(st.just("change"), KEYS, st.none() | VALUES),
    st.tuples(st.just("replace"), st.dictionaries(KEYS, VALUES), st.none()),
    st.tuples(st.just("take"), st.integers(1, 3), st.none()),
)


@given(st.lists(STEPS, max_size=40))
def test_what_is_told_is_always_a_step_towards_the_truth(
    steps: list[tuple[str, object, bytes | None]],
) -> None:
    asyncio.run(_run(steps))


async def _run(steps: list[tuple[str, object, bytes | None]]) -> None:
    watch = Watch("", 10, lambda _: None)
    truth: dict[str, bytes] = {}
    view: dict[str, bytes] = {}
    whole: list[dict[str, bytes]] = []  # what must be known by the next `Synced`, unless changed
    for kind, what, value in steps:
        match kind, what:
            case "change", str(key):
                watch.change(key, value)
                if value is None:
                    truth.pop(key, None)
                else:
                    truth[key] = value
                whole = [{k: v for k, v in held.items() if k != key} for held in whole]
            case "replace", dict(values):
                watch.replace(values)
                truth = dict(values)
                whole = [dict(values)]
            case _, int(count):
                for _ in range(count):
                    if not await _take(watch, view, whole):
                        assert view == truth
                        break
    while await _take(watch, view, whole):
        pass
    assert view == truth
    assert watch.dropped_total == 0


async def _take(watch: Watch, view: dict[str, bytes], whole: list[dict[str, bytes]]) -> bool:
    """Take one event if one is due; each must change something."""
    if not watch._due:
        return False
    match await anext(watch):
        case Put(key, value):
            assert view.get(key) != value
            view[key] = value
        case Deleted(key):
            del view[key]
        case Synced():
            for expected in whole:
                assert expected.items() <= view.items()
            whole.clear()
    return True


async def test_memory_is_bounded_by_keys_however_many_the_changes() -> None:
    watch = Watch("", 3, lambda _: None)
    for number in range(3):
        watch.change(f"{number}", b"")
    for number in range(10_000):
        watch.change(f"{number % 3}", b"%d" % number)
        watch.change(f"x{number}", b"")
    assert len(watch._due) == len(watch._truth) == 3
    assert watch.dropped_total == 10_000
    assert watch.merged_total == 10_000
    assert {await anext(watch) for _ in range(3)} == {
        Put("0", b"9999"),
        Put("1", b"9997"),
        Put("2", b"9998"),
    }
    assert not watch.is_starved
    watch.change("0", None)
    assert watch.is_starved
    watch.replace({"1": b"", "2": b"", "x": b""})
    assert not watch.is_starved


async def test_one_that_waits_is_told_at_once_and_ends_when_closed() -> None:
    closed: list[Watch] = []
    watch = Watch("", 3, closed.append)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    watch.change("a", b"1")
    assert await asyncio.wait_for(waiting, 60) == Put("a", b"1")
    async with watch:
        watch.change("a", None)
    watch.change("b", b"")
    watch.replace({"b": b""})
    assert [event async for event in watch] == [Deleted("a")]
    assert closed == [watch]
