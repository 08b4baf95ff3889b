"""What every kind of request plane promises, tried on each of them."""

from __future__ import annotations

import asyncio

import pytest

from runtime.requests.base import PRIORITY, REQUEST_ID, TRACEPARENT, Canary
from runtime.requests.errors import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    HandlerFailed,
    Overloaded,
    PayloadTooLarge,
    RequestError,
    UnknownEndpoint,
)
from runtime.requests.stream import ResponseStream
from tests.runtime.requests.conftest import Stage
from tests.runtime.requests.handlers import WAIT_S, deaf, until


async def read(stream: ResponseStream) -> list[bytes]:
    async with asyncio.timeout(WAIT_S):
        return [item async for item in stream]


async def whole(stream: ResponseStream) -> int:
    """How many items there are, read as they come together."""
    async with asyncio.timeout(WAIT_S), stream:
        return sum([len(items) async for items in stream.batches()])


def ask(stage: Stage, endpoint: str, payload: bytes = b"", **other: float) -> ResponseStream:
    return stage.client.stream(stage.address, endpoint, payload, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 10, 10_000])
async def test_all_items_come_in_order(stage: Stage, count: int) -> None:
    items = await read(ask(stage, "test.count.to", b"%d" % count))
    assert items == [b"%d" % number for number in range(count)]
    await until(lambda: stage.server.status().outcomes_total == {"done": 1})
    await until(lambda: stage.client.status().in_flight == 0)


async def test_200_streams_at_once_each_get_their_own(stage: Stage) -> None:
    lengths = range(200)
    answers = await asyncio.gather(
        *(read(ask(stage, "test.count.to", b"%d" % length)) for length in lengths)
    )
    assert answers == [[b"%d" % number for number in range(length)] for length in lengths]
    assert stage.server.status().requests_total == 200


async def test_a_handler_sees_headers_priority_id_and_deadline(stage: Stage) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {TRACEPARENT: trace, PRIORITY: "-7", REQUEST_ID: "r-1", "x-other": "a b"}
    await read(
        stage.client.stream(stage.address, "test.echo.once", b"", headers=headers, deadline_s=9.0)
    )
    context = stage.handlers.contexts[0]
    assert dict(context.headers) == headers
    assert (context.id, context.priority, context.endpoint) == ("r-1", -7, "test.echo.once")
    assert 0 < context.left_s() <= 9.0


async def test_a_request_without_an_id_gets_one_that_both_sides_know(stage: Stage) -> None:
    stream = ask(stage, "test.echo.once")
    await read(stream)
    assert stage.handlers.contexts[0].id == stream.request_id != ""
    assert stage.handlers.contexts[0].priority == 0


async def test_payloads_arrive_as_they_were(stage: Stage) -> None:
    for payload in (b"", bytes(range(256)), b"\r\n\0" * 100_000):
        assert await read(ask(stage, "test.echo.once", payload)) == [payload]


async def test_an_unknown_endpoint_is_refused_and_may_be_asked_elsewhere(stage: Stage) -> None:
    with pytest.raises(UnknownEndpoint) as caught:
        await read(ask(stage, "test.no.such"))
    assert caught.value.may_retry
    assert "test.no.such" in str(caught.value) and stage.address in str(caught.value)
    stage.server.withdraw("test.echo.once")
    with pytest.raises(UnknownEndpoint):
        await read(ask(stage, "test.echo.once"))


@pytest.mark.parametrize("count", [0, 3])
async def test_a_handlers_failure_comes_with_its_words_after_its_items(
    stage: Stage, count: int
) -> None:
    stream = ask(stage, "test.raise.after", b"%d" % count)
    got: list[bytes] = []

    async def gather() -> None:
        async for item in stream:
            got.append(item)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(HandlerFailed, match="ValueError: the handler's own words") as caught:
        await asyncio.wait_for(gather(), WAIT_S)
    assert got == [b"%d" % number for number in range(count)]
    assert (caught.value.received_items, caught.value.may_retry) == (count, False)


@pytest.mark.parametrize("count", [0, 3, 3000])
async def test_items_that_come_together_are_all_there_before_a_failure(
    stage: Stage, count: int
) -> None:
    got: list[list[bytes]] = []

    async def gather() -> None:
        async for items in ask(stage, "test.raise.after", b"%d" % count).batches():
            got.append(items)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(HandlerFailed):
        await asyncio.wait_for(gather(), WAIT_S)
    assert all(got)
    assert [item for items in got for item in items] == [b"%d" % number for number in range(count)]
    assert await whole(ask(stage, "test.count.to", b"%d" % count)) == count


async def test_a_handler_that_yields_no_bytes_has_failed(stage: Stage) -> None:
    with pytest.raises(HandlerFailed, match="it yielded str"):
        await read(ask(stage, "test.not.bytes"))
    assert await read(ask(stage, "test.echo.once", b"x")) == [b"x"]


async def test_leaving_a_stream_early_runs_the_handlers_finally(stage: Stage) -> None:
    async with ask(stage, "test.wait.forever") as stream:
        assert await anext(stream) == b"begun"
    await until(lambda: stage.handlers.ended == 1)
    assert stage.handlers.contexts[0].killed.is_set()
    with pytest.raises(Cancelled):
        await anext(stream)
    await until(lambda: stage.server.status().in_flight == 0)
    assert stage.server.status().outcomes_total == {"cancelled": 1}


async def test_a_stream_that_is_dropped_cancels_its_handler_too(stage: Stage) -> None:
    async for item in ask(stage, "test.wait.forever"):
        assert item == b"begun"
        break
    await until(lambda: stage.handlers.ended == 1)


async def test_cancelling_the_readers_task_cancels_its_handler(stage: Stage) -> None:
    task = asyncio.create_task(read(ask(stage, "test.wait.forever")))
    await until(lambda: stage.handlers.begun == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await until(lambda: stage.handlers.ended == 1)


async def test_stopping_lets_the_handler_finish_its_answer(stage: Stage) -> None:
    stream = ask(stage, "test.until.stopped")
    async with asyncio.timeout(WAIT_S):
        assert await anext(stream) == b"begun"
        stream.stop()
        assert [item async for item in stream] == [b"stopped"]


async def test_the_deadline_ends_both_sides(stage: Stage) -> None:
    stream = ask(stage, "test.wait.forever", deadline_s=2.0)  # time for one item on a busy machine
    with pytest.raises(DeadlineExceeded) as caught:
        await read(stream)
    assert caught.value.received_items == 1
    await until(lambda: stage.handlers.ended == 1)
    await until(lambda: stage.server.status().in_flight == 0)


async def test_a_deadline_that_is_over_already_is_one(stage: Stage) -> None:
    with pytest.raises(DeadlineExceeded):
        await read(ask(stage, "test.wait.forever", deadline_s=0.0))
    await until(lambda: stage.handlers.ended == stage.handlers.begun)


async def test_a_handler_that_swallows_its_cancellation_gets_no_further(stage: Stage) -> None:
    stage.server.serve("test.deaf.one", deaf)
    with pytest.raises(DeadlineExceeded):
        await read(ask(stage, "test.deaf.one", deadline_s=0.2))
    await until(lambda: stage.server.status().in_flight == 0)


async def test_a_slow_reader_holds_up_its_own_handler_and_nobody_else(stage: Stage) -> None:
    """The handler could yield for ever; it stops when a window and what is under it are full."""
    async with ask(stage, "test.many.bytes") as slow:
        await anext(slow)
        before = -1
        async with asyncio.timeout(WAIT_S):
            while stage.handlers.yielded != before:
                before = stage.handlers.yielded
                assert await read(ask(stage, "test.count.to", b"1000"))
                await asyncio.sleep(0.1)
        # HTTP has a connection of its own for each stream; its socket buffers count as window.
        most_bytes = stage.settings.window + (8 << 20 if stage.settings.plane == "http" else 0)
        assert stage.handlers.yielded * 10_000 < most_bytes + 30_000
        for _ in range(200):
            assert len(await anext(slow)) == 10_000
    await until(lambda: stage.handlers.ended == 1)


async def test_a_request_over_the_limit_is_refused_before_it_is_sent(stage: Stage) -> None:
    with pytest.raises(PayloadTooLarge, match="a request of 1048576 bytes; at most 10") as caught:
        await read(ask(stage, "test.echo.once", b"x" * (1 << 20)))
    assert not caught.value.may_retry
    largest = int(str(caught.value).rpartition("at most ")[2].partition(" ")[0])
    assert len((await read(ask(stage, "test.echo.once", b"x" * (largest - 64))))[0]) == largest - 64


async def test_a_response_over_the_limit_ends_its_stream_alone(stage: Stage) -> None:
    async with ask(stage, "test.wait.forever") as other:
        await anext(other)
        with pytest.raises(PayloadTooLarge, match="a response of 1048576 bytes") as caught:
            await read(ask(stage, "test.one.large", b"%d" % (1 << 20)))
        assert caught.value.received_items == 1
        assert stage.handlers.ended == 0


async def test_more_than_may_be_in_flight_is_refused(stage: Stage) -> None:
    """The client's own bound and the server's are the same here, so either may say it."""
    most = stage.settings.in_flight_max
    held = [ask(stage, "test.wait.forever") for _ in range(most)]
    for stream in held:
        assert await anext(stream) == b"begun"
    with pytest.raises(Overloaded) as caught:
        await read(ask(stage, "test.echo.once"))
    assert caught.value.may_retry
    second = stage.plane.client()
    with pytest.raises(Overloaded, match=f"the server has {most} requests"):
        await read(second.stream(stage.address, "test.echo.once", b""))
    await second.close()
    for stream in held:
        await stream.aclose()
    await until(lambda: stage.handlers.ended == most)
    assert await read(ask(stage, "test.echo.once", b"x")) == [b"x"]


async def test_draining_refuses_the_new_and_lets_the_old_end(stage: Stage) -> None:
    stream = ask(stage, "test.until.stopped")
    assert await anext(stream) == b"begun"
    drain = asyncio.create_task(stage.server.drain(WAIT_S))
    await until(lambda: stage.server.status().draining)
    with pytest.raises(Draining) as caught:
        await read(ask(stage, "test.echo.once"))
    assert caught.value.may_retry
    assert not drain.done()
    stream.stop()
    assert await read(stream) == [b"stopped"]
    assert await drain == 0


async def test_what_outlasts_the_drain_is_cancelled_and_told(stage: Stage) -> None:
    stream = ask(stage, "test.wait.forever")
    assert await anext(stream) == b"begun"
    assert await stage.server.drain(0.1) == 1
    assert stage.handlers.ended == 1
    with pytest.raises(Cancelled) as caught:
        await read(stream)
    assert caught.value.received_items == 1


async def test_closing_the_server_ends_its_streams_with_an_error(stage: Stage) -> None:
    stream = ask(stage, "test.wait.forever")
    assert await anext(stream) == b"begun"
    await stage.server.close()
    await stage.server.close()
    assert stage.handlers.ended == 1
    with pytest.raises((Cancelled, ConnectionLost)) as caught:
        await read(stream)
    assert caught.value.received_items == 1 and not caught.value.may_retry
    with pytest.raises(ConnectionLost) as refused:
        await read(ask(stage, "test.echo.once"))
    assert (refused.value.received_items, refused.value.may_retry) == (0, True)


async def test_closing_the_client_ends_its_streams_and_their_handlers(stage: Stage) -> None:
    stream = ask(stage, "test.wait.forever")
    assert await anext(stream) == b"begun"
    await stage.client.close()
    await stage.client.close()
    with pytest.raises(RequestError):
        await read(stream)
    await until(lambda: stage.handlers.ended == 1)
    with pytest.raises(ConnectionLost, match="closed"):
        await read(ask(stage, "test.echo.once"))


@pytest.mark.parametrize("address", ["", "tcp://", "bogus://x:1", "tcp://h:x", "nats:///", "http:"])
async def test_an_address_that_is_none_is_an_error_like_others(stage: Stage, address: str) -> None:
    with pytest.raises(ConnectionLost) as caught:
        await read(stage.client.stream(address, "test.echo.once", b"", deadline_s=WAIT_S))
    assert caught.value.may_retry


@pytest.mark.parametrize("headers", [{"A": "x"}, {"a\r\nb": "x"}, {"a": "x\r\ny"}, {"a": "é"}])
async def test_headers_that_not_every_kind_can_carry_are_refused(
    stage: Stage, headers: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="header"):
        stage.client.stream(stage.address, "test.echo.once", b"", headers=headers)


async def test_a_failing_canary_makes_its_endpoint_unhealthy_until_it_answers(stage: Stage) -> None:
    broken = True

    async def handler(payload, context):  # type: ignore[no-untyped-def]
        if payload == b"canary" and broken:
            raise RuntimeError("engine is dead")
        yield payload

    stage.server.serve("test.with.canary", handler, canary=Canary(b"canary", 0.1, 1.0))
    await until(lambda: not stage.server.status().healthy)
    status = stage.server.status().endpoints["test.with.canary"]
    assert status.unhealthy is not None and "engine is dead" in status.unhealthy
    assert stage.server.status().requests_total == 0
    broken = False
    await until(lambda: stage.server.status().healthy)


async def test_a_canary_that_hangs_is_unhealthy_and_cancelled(stage: Stage) -> None:
    stage.server.serve(
        "test.hung.canary", stage.handlers.forever, canary=Canary(b"", 0.1, timeout_s=0.1)
    )
    await until(lambda: not stage.server.status().healthy)
    assert stage.handlers.ended >= 1
