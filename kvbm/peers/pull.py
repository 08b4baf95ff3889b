"""Bytes of claims over TCP: the way that needs no NIXL. Connections are kept and used in turns."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvbm.peers import wire
from kvbm.peers.greeting import Greeter
from kvbm.protocol import FrameError, encode
from storage_tiers.files import Moved, MoveOutcome, NotMoved
from storage_tiers.stream import receive_all, send_all

CONNECTIONS_MAX: Final = 4  # to one peer, at a time
_LENGTH = struct.Struct("<I")
_ANSWER_BYTES_MAX: Final = 64


class DataConnections:
    """To one peer, for as long as the control connection of that session lives."""

    def __init__(self, address: tuple[str, int], greeter: Greeter, session: bytes) -> None:
        self._address = address
        self._greeter = greeter
        self._session = session
        self._idle: list[socket.socket] = []
        self._turns = asyncio.Semaphore(CONNECTIONS_MAX)
        self._threads = ThreadPoolExecutor(CONNECTIONS_MAX, thread_name_prefix="peer-pull")
        self._is_closed = False

    def close(self) -> None:
        """No more pulls; those under way end by themselves, at their deadline at the latest."""
        self._is_closed = True
        for sock in self._idle:
            sock.close()
        self._idle.clear()
        self._threads.shutdown(wait=False)

    async def pull(self, number: int, views: Sequence[memoryview], deadline: float) -> MoveOutcome:
        """Fill the views with the bytes of a claim. Not to be cancelled: a thread fills them."""
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + _left(deadline)):
                await self._turns.acquire()
        except TimeoutError:
            return NotMoved("no connection was free before the deadline")
        try:
            return await self._pull(number, views, deadline)
        finally:
            self._turns.release()

    async def _pull(self, number: int, views: Sequence[memoryview], deadline: float) -> MoveOutcome:
        loop = asyncio.get_running_loop()
        sock: socket.socket | None = None
        try:
            if self._is_closed:
                return NotMoved("the peer is away")
            sock = await self._connection(deadline)
            await loop.run_in_executor(self._threads, _receive, sock, number, views, deadline)
        except (OSError, TimeoutError, FrameError, RuntimeError) as error:
            if sock is not None:
                sock.close()
            return NotMoved(f"TCP: {str(error) or type(error).__name__}")
        if self._is_closed:
            sock.close()
        else:
            self._idle.append(sock)
        return Moved()

    async def _connection(self, deadline: float) -> socket.socket:
        if self._idle:
            return self._idle.pop()
        async with asyncio.timeout(_left(deadline)):
            greeted = await self._greeter.greet(self._address, wire.DATA, session=self._session)
        return greeted.sock


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _receive(
    sock: socket.socket, number: int, views: Sequence[memoryview], deadline: float
) -> None:
    """On a thread: ask, and fill the views. Raises OSError, TimeoutError or FrameError."""
    send_all(sock, [memoryview(encode(wire.Pull(number)))], deadline)
    head = bytearray(_LENGTH.size)
    receive_all(sock, [memoryview(head)], deadline)
    (length,) = _LENGTH.unpack(head)
    if length > _ANSWER_BYTES_MAX:
        raise FrameError(f"an answer of {length} bytes")
    body = bytearray(length)
    receive_all(sock, [memoryview(body)], deadline)
    answer = wire.decode_from_owner(bytes(body))
    if not isinstance(answer, wire.Pulled):
        raise FrameError(f"expected bytes, got {type(answer).__name__}")
    if answer.size != sum(len(view) for view in views):
        raise FrameError("the claim is over" if not answer.size else "another number of bytes")
    receive_all(sock, views, deadline)
