"""Telling systemd how the daemon is: ready, alive, stopping. Silent where systemd is not."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Self


class Notifier:
    """sd_notify(3): one datagram per fact. A systemd that does not listen is no error."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        self._address = address
        self.watchdog_s = watchdog_s  # systemd restarts us when it hears nothing for so long

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        watchdog_us = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_s = int(watchdog_us) / 1e6 if ours and watchdog_us.isdigit() else None
        return cls(environ.get("NOTIFY_SOCKET"), watchdog_s or None)

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

    def _send(self, message: str) -> bool:
        """Whether systemd was told; never raises, never blocks."""
        if not self._address:
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendto(message.encode(), address)
            except OSError:
                return False
        return True
