"""Chunks over a TCP connection, without NIXL: bytes between a socket and memory, on a thread.

Both calls block until all bytes have moved or the deadline is over; the socket is of no use after
an error. Neither touches the memory any more once it has returned.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Final

_PART_BYTES: Final = 1 << 20  # of one call, so that a deadline is looked at in between


def send_all(sock: socket.socket, views: Sequence[memoryview], deadline: float) -> None:
    """Send every byte before `deadline` (monotonic). Raises OSError, TimeoutError included."""
    for view in views:
        sent = 0
        while sent < len(view):
            _allow(sock, deadline)
            sent += sock.send(view[sent : sent + _PART_BYTES])


def receive_all(sock: socket.socket, views: Sequence[memoryview], deadline: float) -> None:
    """Fill every view before `deadline` (monotonic). Raises OSError, TimeoutError included."""
    for view in views:
        filled = 0
        while filled < len(view):
            _allow(sock, deadline)
            count = sock.recv_into(view[filled : filled + _PART_BYTES])
            if not count:
                raise ConnectionError("the peer closed the connection")
            filled += count


def _allow(sock: socket.socket, deadline: float) -> None:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the deadline is over")
    sock.settimeout(left_s)
