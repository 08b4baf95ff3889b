"""NIXL: bytes between memory and the SSD's file through its POSIX plugin. The one file that
imports it, and only when asked.

One thread owns an agent: it registers memory and files, starts transfers and polls them; callers
on the event loop only queue transfers and await their outcome. Registrations are cached. What
O_DIRECT cannot take as it lies (an unaligned end) goes through the plain mover on the same file.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from storage_tiers.files import (
    BlockFile,
    Moved,
    MoveOutcome,
    NotMoved,
    Piece,
    PlainFileMover,
    address_of,
    split,
)

__all__ = ["NixlFileMover", "NixlUnavailableError", "availability"]

_IN_FLIGHT_MAX: Final = 16  # transfers; more did not move faster
_REGIONS_MAX: Final = 64  # memory registrations kept
_POLL_S: Final = 0.0001
_START_TIMEOUT_S: Final = 60.0  # the import alone takes seconds on a cold page cache


class NixlUnavailableError(Exception):
    """NIXL or the plugin does not load here; the message says which and why."""


def availability(plugin: str = "POSIX") -> str | None:
    """Why NIXL cannot be used here, or None if it can. Imports it: seconds the first time."""
    try:
        _new_agent("availability", plugin)
    except NixlUnavailableError as error:
        return str(error)
    return None


@dataclass(slots=True)
class _Transfer:
    write: bool
    piece: Piece
    done: asyncio.Future[MoveOutcome]
    handle: Any = None


class NixlFileMover:
    """A `FileMover` on NIXL's POSIX plugin. The constructor blocks until it runs, or raises."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._plain = PlainFileMover(file, threads=2)
        self._queue: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._trouble: str | None = None
        self._regions: dict[tuple[int, int], Any] = {}  # (address, length) -> registration
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._own_agent, name="nixl", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S):
            self._trouble = f"NIXL did not start within {_START_TIMEOUT_S:.0f} s"
        if self._trouble is not None:
            raise NixlUnavailableError(self._trouble)

    @property
    def name(self) -> str:
        return "nixl-posix" if self._file.direct else "nixl-posix-buffered"

    async def write(self, pieces: Sequence[Piece]) -> list[MoveOutcome]:
        return await self._each(pieces, write=True)

    async def read(self, pieces: Sequence[Piece]) -> list[MoveOutcome]:
        return await self._each(pieces, write=False)

    async def sync(self) -> MoveOutcome:
        return await self._plain.sync()

    async def close(self) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        await self._plain.close()

    async def _each(self, pieces: Sequence[Piece], *, write: bool) -> list[MoveOutcome]:
        loop = self._loop = asyncio.get_running_loop()
        transfers: list[tuple[int, _Transfer]] = []
        bounced: list[tuple[int, Piece]] = []
        for index, piece in enumerate(pieces):
            whole, rest = split(piece, direct=self._file.direct)
            if whole is not None:
                transfers.append((index, _Transfer(write, whole, loop.create_future())))
            if rest is not None:
                bounced.append((index, rest))
        for _, transfer in transfers:
            self._queue.put(transfer)
        outcomes: list[MoveOutcome] = [Moved()] * len(pieces)
        if bounced:
            move = self._plain.write if write else self._plain.read
            results = await move([piece for _, piece in bounced])
            for (index, _), outcome in zip(bounced, results, strict=True):
                outcomes[index] = outcome
        for index, transfer in transfers:
            outcome = await transfer.done
            if isinstance(outcome, NotMoved):
                outcomes[index] = outcome
        return outcomes

    # -- below: on the owning thread only ------------------------------------------------

    def _own_agent(self) -> None:
        try:
            agent, errors = _new_agent("kvbm-files", "POSIX")
            file = [(0, self._file.size_bytes, self._file.fd, "")]
            try:
                registration = agent.register_memory(file, "FILE", backends=["POSIX"])
            except errors as error:
                raise NixlUnavailableError(f"NIXL refused the file: {error}") from error
        except NixlUnavailableError as error:
            self._trouble = str(error)
            return
        finally:
            self._started.set()
        live: list[_Transfer] = []
        open_ = True
        while open_ or live:
            open_ = self._start_queued(agent, errors, live) and open_
            live = [transfer for transfer in live if not self._ended(agent, errors, transfer)]
            if live:
                time.sleep(_POLL_S)
        agent.deregister_memory(registration)
        for region in self._regions.values():
            agent.deregister_memory(region)

    def _start_queued(self, agent: Any, errors: Any, live: list[_Transfer]) -> bool:
        """Start what fits in flight, waiting for work when idle. False: asked to end."""
        while len(live) < _IN_FLIGHT_MAX:
            try:
                transfer = self._queue.get(block=not live)
            except queue.Empty:
                return True
            if transfer is None:
                return False
            try:
                transfer.handle = self._start(agent, transfer, idle=not live)
            except errors as error:
                self._finish(transfer, NotMoved(f"NIXL: {error} at {transfer.piece.offset}"))
            else:
                live.append(transfer)
        return True

    def _start(self, agent: Any, transfer: _Transfer, *, idle: bool) -> Any:
        piece = transfer.piece
        address, length = address_of(piece.data), len(piece.data)
        self._register(agent, piece.data, address, idle=idle)
        local = agent.get_xfer_descs([(address, length, 0)], "DRAM")
        remote = agent.get_xfer_descs([(piece.offset, length, self._file.fd)], "FILE")
        operation = "WRITE" if transfer.write else "READ"
        handle = agent.initialize_xfer(operation, local, remote, agent.name, b"", ["POSIX"])
        try:
            agent.transfer(handle)
        except BaseException:
            agent.release_xfer_handle(handle)
            raise
        return handle

    def _register(self, agent: Any, data: memoryview, address: int, *, idle: bool) -> None:
        """Make sure a registration covers the view; registers the whole buffer it is part of."""
        end = address + len(data)
        if any(at <= address and end <= at + length for at, length in self._regions):
            return
        if idle and len(self._regions) >= _REGIONS_MAX:
            oldest = next(iter(self._regions))
            agent.deregister_memory(self._regions.pop(oldest))
        whole = memoryview(data.obj)
        start = address_of(whole) if whole.contiguous else address
        region = (start, whole.nbytes if whole.contiguous else len(data))
        self._regions[region] = agent.register_memory(
            [(*region, 0, "")], "DRAM", backends=["POSIX"]
        )

    def _ended(self, agent: Any, errors: Any, transfer: _Transfer) -> bool:
        outcome: MoveOutcome = Moved()
        try:
            state = agent.check_xfer_state(transfer.handle)
            if state == "PROC":
                return False
            if state != "DONE":
                outcome = NotMoved(f"NIXL: {state} at {transfer.piece.offset}")
            agent.release_xfer_handle(transfer.handle)
        except errors as error:
            outcome = NotMoved(f"NIXL: {error} at {transfer.piece.offset}")
        self._finish(transfer, outcome)
        return True

    def _finish(self, transfer: _Transfer, outcome: MoveOutcome) -> None:
        assert self._loop is not None, "a transfer was queued from a loop"
        transfer.handle = None
        self._loop.call_soon_threadsafe(_resolve, transfer.done, outcome)


def _resolve(future: asyncio.Future[MoveOutcome], outcome: MoveOutcome) -> None:
    if not future.done():
        future.set_result(outcome)


def _new_agent(name: str, plugin: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """An agent with one plugin, and the exceptions its calls raise."""
    try:
        from nixl import _bindings
        from nixl._api import nixl_agent, nixl_agent_config
    except (ImportError, OSError) as error:
        raise NixlUnavailableError(f"NIXL does not import: {error}") from error
    logging.getLogger("nixl").setLevel(logging.WARNING)  # it reports to stdout otherwise
    errors = tuple(
        kind
        for name, kind in vars(_bindings).items()
        if name.endswith("Error") and isinstance(kind, type) and issubclass(kind, Exception)
    )
    try:
        agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
        if plugin not in agent.get_plugin_list():
            raise NixlUnavailableError(f"NIXL has no {plugin} plugin here")
        agent.create_backend(plugin, {})
    except errors as error:
        raise NixlUnavailableError(f"NIXL's {plugin} plugin does not load: {error}") from error
    return agent, errors
