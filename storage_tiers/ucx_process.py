"""The process that moves bytes between this node's arena and another's through NIXL's UCX plugin.

UCX cannot say for certain that a transfer which was given up writes no more; the end of the process
that began it can. So the agent lives here, in a child of the daemon that maps the arena: the
daemon (`storage_tiers.ucx`) kills it when a read did not end as it should, and gives the slots to
nobody before it is gone. A fault in UCX costs this process, never the daemon.

One message a packet on the socket given, msgpack arrays both ways; the end of the socket is the
end of the process. Polling is what makes UCX move: busily while a read or a loan is under way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from storage_tiers.arena import Arena
from storage_tiers.files import address_of
from storage_tiers.nixl import NixlUnavailableError, add_plugin, new_agent

PACKET_BYTES_MAX: Final = 128 << 10  # what a socket's default send buffer takes in one piece
_PLUGIN: Final = "UCX"
_BUSY_S: Final = 0.1  # after the last news, poll without a pause for this long
_NAP_S: Final = 0.0005
_IDLE_S: Final = 0.2  # UCX's own housekeeping wants a look now and then
_PR_SET_PDEATHSIG: Final = 1


class RemoteArena(msgspec.Struct, frozen=True, array_like=True):
    """What another node needs in order to read this node's arena."""

    metadata: bytes  # of the NIXL agent; empty: no agent runs
    base: int  # where the arena's data lies in the agent's process


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages."""


class Read(Message, frozen=True):
    """Copy pieces of a remote arena into this one: (offset there, offset here, length)."""

    number: int
    remote: RemoteArena
    pieces: list[tuple[int, int, int]]


class Serve(Message, frozen=True):
    """Others may read from this arena for so many seconds; 0: nobody does any more."""

    seconds: float


class Forget(Message, frozen=True):
    """Nothing will be read from that arena any more."""

    remote: RemoteArena


class Running(Message, frozen=True):
    """The agent runs; how others read from it."""

    own: RemoteArena


class Unavailable(Message, frozen=True):
    """NIXL or the plugin does not load; the process ends."""

    reason: str


class Ended(Message, frozen=True):
    """The end of a read. `over`: certainly nothing of it is written from now on."""

    number: int
    trouble: str  # empty: all bytes are here
    over: bool


_encoder = msgspec.msgpack.Encoder()
_to_process = msgspec.msgpack.Decoder(Read | Serve | Forget)


@dataclass(slots=True)
class _Transfer:
    number: int
    handle: Any


class Process:
    """The agent and its transfers; `run` until the socket ends."""

    def __init__(self, arena: Arena, sock: socket.socket) -> None:
        self._sock = sock
        self._agent, self._errors = new_agent(f"kvbm-{os.getpid()}-{os.urandom(8).hex()}")
        add_plugin(self._agent, self._errors, _PLUGIN, {})
        self._base = address_of(arena.data)
        self._agent.register_memory(
            [(self._base, arena.capacity_bytes, 0, "")], "DRAM", backends=[_PLUGIN]
        )
        self._names: dict[bytes, str] = {}  # metadata -> remote agent
        self._forgotten: list[bytes] = []
        self._live: list[_Transfer] = []
        self._busy_until = self._serve_until = 0.0

    def run(self) -> None:
        self._say(Running(RemoteArena(self._agent.get_agent_metadata(), self._base)))
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        while True:
            for _ in poller.poll(self._pause_s() * 1000):
                packet = self._sock.recv(PACKET_BYTES_MAX)
                if not packet:
                    return
                self._handle(_to_process.decode(packet))
            self._live = [transfer for transfer in self._live if not self._ended(transfer)]
            if not self._live:
                self._forget()
                self._agent.get_new_notifs()  # nobody sends any: this is how NIXL makes progress

    def _pause_s(self) -> float:
        now = time.monotonic()
        if self._live or now < self._busy_until:
            os.sched_yield()
            return 0.0
        return _NAP_S if now < self._serve_until else _IDLE_S

    def _handle(self, message: Read | Serve | Forget) -> None:
        match message:
            case Read():
                self._start(message)
            case Serve():
                now = time.monotonic()
                self._serve_until = now + message.seconds
                self._busy_until = min(now + _BUSY_S, self._serve_until)
            case Forget():
                self._forgotten.append(message.remote.metadata)

    def _forget(self) -> None:
        """Not while anything is under way: it may be from there."""
        for metadata in self._forgotten:
            if (name := self._names.pop(metadata, None)) is not None:
                with contextlib.suppress(*self._errors):
                    self._agent.remove_remote_agent(name)
        self._forgotten.clear()

    def _start(self, read: Read) -> None:
        try:
            handle = self._prepare(read)
        except self._errors as error:
            self._say(Ended(read.number, f"NIXL: {error}", over=True))
            return
        try:
            self._agent.transfer(handle)
        except self._errors as error:
            self._say(Ended(read.number, f"NIXL: {error}", over=False))
            return
        self._live.append(_Transfer(read.number, handle))

    def _prepare(self, read: Read) -> Any:
        agent, remote = self._agent, read.remote
        name = self._names.get(remote.metadata)
        if name is None:
            name = agent.add_remote_agent(remote.metadata)
            self._names[remote.metadata] = name
        here = [(self._base + at, length, 0) for _, at, length in read.pieces]
        there = [(remote.base + at, length, 0) for at, _, length in read.pieces]
        local, far = (agent.get_xfer_descs(pieces, "DRAM") for pieces in (here, there))
        return agent.initialize_xfer("READ", local, far, name, b"", [_PLUGIN])

    def _ended(self, transfer: _Transfer) -> bool:
        trouble = ""
        try:
            state = self._agent.check_xfer_state(transfer.handle)
            if state == "PROC":
                return False
            if state == "DONE":
                self._agent.release_xfer_handle(transfer.handle)
            else:
                trouble = f"NIXL: {state}"
        except self._errors as error:
            trouble = f"NIXL: {error}"
        # One piece's failure says nothing of the others: they may still be written.
        self._say(Ended(transfer.number, trouble, over=not trouble))
        return True

    def _say(self, message: Message) -> None:
        self._sock.send(_encoder.encode(message))


def main(arguments: Sequence[str]) -> int:
    """Descriptors of the arena and of the socket, as the daemon gives them; or nothing, to see
    whether NIXL and the plugin load: if not, the reason goes to standard output.
    """
    if not arguments:
        return _check()
    # An orphan that hangs in UCX would hold all of host memory.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, which is meant for the daemon
    arena = Arena.attach(int(arguments[0]))
    sock = socket.socket(fileno=int(arguments[1]))
    try:
        process = Process(arena, sock)
    except NixlUnavailableError as error:
        sock.send(_encoder.encode(Unavailable(str(error))))
        return 1
    with contextlib.suppress(ConnectionError):
        process.run()
    return 0


def _check() -> int:
    try:
        agent, errors = new_agent("availability")
        add_plugin(agent, errors, _PLUGIN, {})
    except NixlUnavailableError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
