"""Reads from other nodes' arenas through NIXL/UCX, by a child process that may be killed.

`UcxMover.run` keeps the child (`storage_tiers.ucx_process`) running. What it promises: when `read`
returns, however it ends, nothing writes to the pieces any more; if the child cannot vouch for
that, it is killed and gone first. Other reads under way at that moment fail with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from storage_tiers.arena import Arena
from storage_tiers.files import Moved, MoveOutcome, NotMoved
from storage_tiers.settle import settled
from storage_tiers.ucx_process import (
    PACKET_BYTES_MAX,
    Ended,
    Forget,
    Message,
    Read,
    RemoteArena,
    Running,
    Serve,
    Unavailable,
)

START_TIMEOUT_S: Final = 60.0  # the import takes seconds on a cold page cache
RESTART_S_MIN: Final = 0.1
RESTART_S_MAX: Final = 30.0
STARTS_MAX: Final = 3  # that fail one after the other
PIECES_MAX: Final = 1024  # of one read: its message is one packet

_log = structlog.get_logger("kvbm.ucx")
_encoder = msgspec.msgpack.Encoder()
_from_process = msgspec.msgpack.Decoder(Running | Unavailable | Ended)


def availability() -> str | None:
    """Why NIXL/UCX cannot be used here, or None if it can. Blocks for seconds."""
    command = [sys.executable, "-m", "storage_tiers.ucx_process"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the UCX process does not start: {error}"
    said = done.stdout.splitlines()[-1:] or [f"the UCX process ended with status {done.returncode}"]
    return said[0] if done.returncode else None


class UcxMover:
    """Call from one event loop. `changed` is called when others must read in another way."""

    def __init__(self, arena: Arena, changed: Callable[[], None]) -> None:
        self._arena = arena
        self._changed = changed
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._numbers = itertools.count(1)
        self._reads: dict[int, asyncio.Future[Ended]] = {}
        self._gone = asyncio.Event()  # of the process that runs now
        self.own: RemoteArena | None = None  # while it runs
        self.trouble: str | None = None  # why it never will
        self.kills = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Until cancelled, or NIXL turns out not to be there."""
        pause_s, failed_starts = RESTART_S_MIN, 0
        while self.trouble is None:
            try:
                if await self._live():
                    pause_s, failed_starts = RESTART_S_MIN, 0
                else:
                    failed_starts += 1
            finally:
                await self._bury()
            if failed_starts >= STARTS_MAX and self.trouble is None:
                self.trouble = f"the UCX process did not run after {STARTS_MAX} starts"
            if self.trouble is None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RESTART_S_MAX)
        _log.warning("ucx_unavailable", reason=self.trouble)

    async def read(
        self, remote: RemoteArena, pieces: Sequence[tuple[int, int, int]], timeout_s: float
    ) -> MoveOutcome:
        """Copy (offset there, offset here, length) each, all or none of them for certain."""
        assert len(pieces) <= PIECES_MAX
        if self.own is None:
            return NotMoved("the UCX process is not running")
        if timeout_s <= 0:
            return NotMoved("the deadline is over")
        number, gone = next(self._numbers), self._gone
        ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._reads[number] = ended
        try:
            if not self._say(Read(number, remote, list(pieces))):
                return NotMoved("the UCX process does not read its messages")
            async with asyncio.timeout(timeout_s):
                outcome = await ended
        except TimeoutError:
            outcome = Ended(number, f"not read within {timeout_s:.3g} s", over=False)
        except BaseException:
            await self._kill(gone)
            raise
        finally:
            del self._reads[number]
        if not outcome.over:
            await self._kill(gone)
        return NotMoved(outcome.trouble) if outcome.trouble else Moved()

    def serve(self, seconds: float) -> None:
        """Others read from this arena for so long; 0: nobody does any more."""
        self._say(Serve(seconds))

    def forget(self, remote: RemoteArena) -> None:
        """That arena is not there any more."""
        self._say(Forget(remote))

    # -- below ---------------------------------------------------------------------------

    async def _live(self) -> bool:
        """One process's life; whether it ever ran."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._sock, self._gone = ours, asyncio.Event()
        fds = (self._arena.fd, theirs.fileno())
        try:
            # On this thread, whose end is the child's (see its main); it takes a millisecond.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", "storage_tiers.ucx_process", *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            _log.error("ucx_process_failed", reason=str(error))
            return False
        finally:
            theirs.close()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                packet = await loop.sock_recv(ours, PACKET_BYTES_MAX)
            while packet:
                self._heard(_from_process.decode(packet))
                packet = await loop.sock_recv(ours, PACKET_BYTES_MAX)
        return self.own is not None

    def _heard(self, message: Running | Unavailable | Ended) -> None:
        match message:
            case Running():
                self.own = message.own
                _log.info("ucx_process_running", pid=self.pid)
                self._changed()
            case Unavailable():
                self.trouble = message.reason
            case Ended():
                future = self._reads.get(message.number)
                if future is not None and not future.done():
                    future.set_result(message)

    async def _bury(self) -> None:
        """See the process gone, then tell who waits for it."""
        process, was_running = self._process, self.own is not None
        self.own = None
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        try:
            if process is not None:
                process.kill()
                status = await settled(asyncio.to_thread(process.wait))
                if was_running:
                    _log.warning("ucx_process_ended", status=status)
        finally:
            self._process = None
            for number, future in self._reads.items():
                if not future.done():
                    future.set_result(Ended(number, "the UCX process ended", over=True))
            self._gone.set()
            if was_running:
                self._changed()

    async def _kill(self, gone: asyncio.Event) -> None:
        """End the process that a read was given to, and wait until it is gone."""
        if gone is self._gone and self._process is not None:
            self.kills += 1
            self._process.kill()
        await settled(_set(gone))

    def _say(self, message: Message) -> bool:
        if self._sock is None or self.own is None:
            return False
        try:
            self._sock.send(_encoder.encode(message))
        except OSError:  # it is gone, or does not read
            return False
        return True


async def _set(event: asyncio.Event) -> None:
    await event.wait()
