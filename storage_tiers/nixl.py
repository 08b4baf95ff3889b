"""NIXL: the agent and the thread that owns it, and bytes between memory and the SSD's file through
the POSIX plugin. The one file that imports NIXL, and only when asked.

One thread owns an agent: it registers memory and targets, starts transfers and polls them; callers
on the event loop only queue transfers and await their outcome. Registrations of memory and files
are cached. What O_DIRECT cannot take as it lies (an unaligned end) goes through the plain mover.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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

_IN_FLIGHT_MAX: Final = 16  # transfers; more did not move faster
_REGIONS_MAX: Final = 64  # memory registrations kept
_POLL_S: Final = 0.0001
_START_TIMEOUT_S: Final = 60.0  # the import alone takes seconds on a cold page cache
_STOP_TIMEOUT_S: Final = 10.0  # then the thread is left to die with the process


class NixlUnavailableError(Exception):
    """NIXL or the plugin does not load here; the message says which and why."""


def availability(plugin: str = "POSIX") -> str | None:
    """Why NIXL's plugin cannot be used here, or None if it can. Seconds the first time.

    NIXL also lists plugins whose libraries are missing, as GDS without libcufile: so it is loaded.
    """
    try:
        agent, errors = new_agent("availability")
    except NixlUnavailableError as error:
        return str(error)
    if plugin not in agent.get_plugin_list():
        return f"NIXL has no {plugin} plugin here"
    try:
        agent.agent.getPluginParams(plugin)  # NIXL's own wrapper logs the failure and goes on
    except errors as error:
        return f"NIXL's {plugin} plugin does not load: {error}"
    return None


class NixlFileMover:
    """A `FileMover` on the POSIX plugin. The constructor blocks until it runs, or raises."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._owner = AgentOwner("POSIX", {})
        self._plain = PlainFileMover(file, threads=2)

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
        await asyncio.to_thread(self._owner.close)
        await self._plain.close()

    async def _each(self, pieces: Sequence[Piece], *, write: bool) -> list[MoveOutcome]:
        target = Target("FILE", self._file.fd, self._file.size_bytes)
        moving: list[tuple[int, asyncio.Future[MoveOutcome]]] = []
        bounced: list[tuple[int, Piece]] = []
        for index, piece in enumerate(pieces):
            whole, rest = split(piece, direct=self._file.direct)
            if whole is not None:
                done = self._owner.move(whole.data, target, whole.offset, write=write)
                moving.append((index, done))
            if rest is not None:
                bounced.append((index, rest))
        outcomes: list[MoveOutcome] = [Moved()] * len(pieces)
        if bounced:
            move = self._plain.write if write else self._plain.read
            results = await move([piece for _, piece in bounced])
            for (index, _), outcome in zip(bounced, results, strict=True):
                outcomes[index] = outcome
        for index, done in moving:
            outcome = await done
            if isinstance(outcome, NotMoved):
                outcomes[index] = outcome
        return outcomes


@dataclass(frozen=True, slots=True)
class Target:
    """A file or an object; files stay registered, objects for one transfer."""

    kind: str
    device: int  # the descriptor of a file, any unique number for an object
    size_bytes: int
    name: str = ""


@dataclass(slots=True)
class _Transfer:
    data: memoryview  # keeps the memory alive until NIXL is done with it
    target: Target
    offset: int
    write: bool
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[MoveOutcome]
    handle: Any = None
    registration: Any = None


class AgentOwner:
    """One agent with one plugin, and the thread that alone touches it."""

    def __init__(self, plugin: str, options: Mapping[str, str]) -> None:
        self._plugin = plugin
        self._options = dict(options)
        self._queue: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._trouble: str | None = None
        self._agent: Any = None
        self._errors: tuple[type[Exception], ...] = ()
        self._regions: dict[tuple[int, int], Any] = {}  # (address, length) -> registration
        self._files: dict[Target, Any] = {}
        self._thread = threading.Thread(target=self._run, name=f"nixl-{plugin}", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S):
            self._trouble = f"NIXL did not start within {_START_TIMEOUT_S:.0f} s"
        if self._trouble is not None:
            raise NixlUnavailableError(self._trouble)

    def move(
        self, data: memoryview, target: Target, offset: int, *, write: bool
    ) -> asyncio.Future[MoveOutcome]:
        """Queue one contiguous transfer; called on an event loop."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[MoveOutcome] = loop.create_future()
        self._queue.put(_Transfer(data, target, offset, write, loop, done))
        return done

    def close(self) -> None:
        """Finish what is queued and end the thread. Blocks."""
        self._queue.put(None)
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._agent, self._errors = new_agent(f"kvbm-{self._plugin}")
            add_plugin(self._agent, self._errors, self._plugin, self._options)
        except NixlUnavailableError as error:
            self._trouble = str(error)
            return
        finally:
            self._started.set()
        live: list[_Transfer] = []
        running = True
        while running or live:
            running = running and self._start_queued(live)
            live = [transfer for transfer in live if not self._ended(transfer)]
            if live:
                time.sleep(_POLL_S)
        for registration in (*self._regions.values(), *self._files.values()):
            self._agent.deregister_memory(registration)

    def _start_queued(self, live: list[_Transfer]) -> bool:
        """Start what fits in flight, waiting for work when idle. False: asked to end."""
        while len(live) < _IN_FLIGHT_MAX:
            try:
                transfer = self._queue.get(block=not live)
            except queue.Empty:
                return True
            if transfer is None:
                return False
            if transfer.done.cancelled():
                continue
            try:
                self._start(transfer, idle=not live)
            except self._errors as error:
                self._finish(transfer, NotMoved(f"NIXL: {error} at {transfer.offset}"))
            else:
                live.append(transfer)
        return True

    def _start(self, transfer: _Transfer, *, idle: bool) -> None:
        agent, target, plugin = self._agent, transfer.target, self._plugin
        address, length = address_of(transfer.data), len(transfer.data)
        self._register_memory(transfer.data, address, idle=idle)
        self._register_target(transfer)
        local = agent.get_xfer_descs([(address, length, 0)], "DRAM")
        remote = agent.get_xfer_descs([(transfer.offset, length, target.device)], target.kind)
        operation = "WRITE" if transfer.write else "READ"
        handle = agent.initialize_xfer(operation, local, remote, agent.name, b"", [plugin])
        transfer.handle = handle
        agent.transfer(handle)

    def _register_memory(self, data: memoryview, address: int, *, idle: bool) -> None:
        """Make sure a registration covers the view; registers the whole buffer it is part of."""
        end = address + len(data)
        if any(at <= address and end <= at + length for at, length in self._regions):
            return
        if idle and len(self._regions) >= _REGIONS_MAX:
            for registration in self._regions.values():
                self._agent.deregister_memory(registration)
            self._regions.clear()
        whole = memoryview(data.obj)
        start = address_of(whole) if whole.contiguous else address
        region = (start, whole.nbytes if whole.contiguous else len(data))
        self._regions[region] = self._register("DRAM", (*region, 0, ""))

    def _register_target(self, transfer: _Transfer) -> None:
        target = transfer.target
        if target in self._files:
            return
        descriptor = (0, target.size_bytes, target.device, target.name)
        registration = self._register(target.kind, descriptor)
        if target.kind == "FILE":
            self._files[target] = registration
        else:
            transfer.registration = registration

    def _register(self, kind: str, descriptor: tuple[int, int, int, str]) -> Any:
        return self._agent.register_memory([descriptor], kind, backends=[self._plugin])

    def _ended(self, transfer: _Transfer) -> bool:
        outcome: MoveOutcome = Moved()
        try:
            state = self._agent.check_xfer_state(transfer.handle)
            if state == "PROC":
                return False
            if state != "DONE":
                outcome = NotMoved(f"NIXL: {state} at {transfer.offset}")
        except self._errors as error:
            outcome = NotMoved(f"NIXL: {error} at {transfer.offset}")
        self._finish(transfer, outcome)
        return True

    def _finish(self, transfer: _Transfer, outcome: MoveOutcome) -> None:
        try:
            if transfer.handle is not None:
                self._agent.release_xfer_handle(transfer.handle)
            if transfer.registration is not None:
                self._agent.deregister_memory(transfer.registration)
        except self._errors as error:
            outcome = NotMoved(f"NIXL: {error} at {transfer.offset}")
        try:
            transfer.loop.call_soon_threadsafe(_resolve, transfer.done, outcome)
        except RuntimeError:
            return  # the loop has ended: nobody waits any more


def _resolve(future: asyncio.Future[MoveOutcome], outcome: MoveOutcome) -> None:
    if not future.done():
        future.set_result(outcome)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """NIXL imports it only to ask for CUDA's version, which it finds otherwise as well.

    It would cost the daemon seconds at its start and 200 MB.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def new_agent(name: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """An agent without plugins, and the exceptions its calls raise."""
    try:
        with _without_torch():
            from nixl import _bindings
            from nixl._api import nixl_agent, nixl_agent_config
    except (ImportError, OSError) as error:
        raise NixlUnavailableError(f"NIXL does not import: {error}") from error
    logging.getLogger("nixl").setLevel(logging.WARNING)  # it reports to stdout otherwise
    errors = tuple(
        kind
        for kind_name, kind in vars(_bindings).items()
        if kind_name.endswith("Error") and isinstance(kind, type) and issubclass(kind, Exception)
    )
    raised: tuple[type[Exception], ...] = (RuntimeError, *errors)
    try:
        config = nixl_agent_config(enable_prog_thread=False, backends=[])
        return nixl_agent(name, config), errors
    except raised as error:
        raise NixlUnavailableError(f"NIXL makes no agent: {error}") from error


def add_plugin(
    agent: Any, errors: tuple[type[Exception], ...], plugin: str, options: dict[str, str]
) -> None:
    if plugin not in agent.get_plugin_list():
        raise NixlUnavailableError(f"NIXL has no {plugin} plugin here")
    try:
        agent.create_backend(plugin, options)
    except errors as error:
        raise NixlUnavailableError(f"NIXL's {plugin} plugin does not load: {error}") from error
