"""SIGTERM and SIGINT as a launcher takes them: the first asks to stop, the next means at once."""

from __future__ import annotations

import asyncio
import signal
from typing import Self


class StopSignals:
    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    @classmethod
    def installed(cls) -> Self:
        """On the running loop, in the main thread."""
        signals = cls()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, signals.take)
        return signals

    def take(self) -> None:
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()
