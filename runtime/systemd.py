"""Telling systemd how the daemon is: ready, alive, stopping. Silent where systemd is not.

And leaving file descriptors with it for the next daemon (systemd.service(5), file descriptor
store). `kvbm-daemon hold` speaks the same protocol from the other side where there is no systemd.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Self

FIRST_FD: Final = 3  # of those that a service is started with
BARRIER_S: Final = 5.0


def take_inherited(environ: Mapping[str, str]) -> dict[str, int]:
    """Descriptors that this process was started with, by name; from now on the caller's.

    Those without a name and all but the last of one name are closed. Call once.
    """
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
        return {}
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for index in range(int(count)):
        fd = FIRST_FD + index
        with contextlib.suppress(OSError):  # not there: somebody closed it before us
            os.set_inheritable(fd, False)
            name = names[index] if index < len(names) else ""
            if (before := found.pop(name, None)) is not None:
                os.close(before)
            found[name] = fd
    if (nameless := found.pop("", None)) is not None:
        os.close(nameless)
    return found


class Notifier:
    """sd_notify(3): one datagram per fact. A systemd that does not listen is no error."""

    def __init__(
        self, address: str | None, watchdog_s: float | None, store_max: int | None = None
    ) -> None:
        self._address = address
        self.store_max = store_max  # descriptors it keeps; None: it does not tell
        self.watchdog_s = watchdog_s  # systemd restarts us when it hears nothing for so long

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        watchdog_us = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_s = int(watchdog_us) / 1e6 if ours and watchdog_us.isdigit() else None
        store_max = environ.get("FDSTORE", "")
        return cls(
            environ.get("NOTIFY_SOCKET"),
            watchdog_s or None,
            int(store_max) if store_max.isdigit() else None,
        )

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._address)

    def ready(self, status: str) -> bool:
        return self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(f"STATUS={status}")

    def stopping(self) -> bool:
        return self._send("STOPPING=1")

    def alive(self) -> bool:
        return self._send("WATCHDOG=1")

    async def feed_watchdog(self) -> None:
        """Say that the event loop turns, twice per watchdog period; returns if there is none."""
        while self.watchdog_s is not None:
            self.alive()
            await asyncio.sleep(self.watchdog_s / 2)

    async def store(self, fds: Mapping[str, int]) -> bool:
        """Leave these with systemd for our next start, instead of any of the same names.

        True once it has dealt with them, within `BARRIER_S`. It takes at most what the unit's
        FileDescriptorStoreMax allows, and does not say what it refused.
        """
        self.forget(fds)
        if not all(self._send(f"FDSTORE=1\nFDNAME={name}", [fd]) for name, fd in fds.items()):
            return False
        ours, its = os.pipe2(os.O_CLOEXEC)
        try:
            sent = self._send("BARRIER=1", [its])
        finally:
            os.close(its)
        try:
            return sent and await asyncio.to_thread(_hung_up, ours, BARRIER_S)
        finally:
            os.close(ours)

    def forget(self, names: Iterable[str]) -> None:
        """Have it close what it keeps under these names."""
        for name in names:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, message: str, fds: Sequence[int] = ()) -> bool:
        """Whether systemd was told; never raises, never blocks."""
        if not self._address:
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendmsg([message.encode()], rights, 0, address)
            except OSError:
                return False
        return True


def _hung_up(fd: int, timeout_s: float) -> bool:
    """Wait until nobody has the other end of the pipe."""
    poll = select.poll()
    poll.register(fd, 0)  # hanging up is always told
    return bool(poll.poll(1e3 * timeout_s))
