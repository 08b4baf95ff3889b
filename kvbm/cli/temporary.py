"""A daemon of a command's own: started in a folder of its own, restarted at will, ended with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from kvbm.cli.client import AdminClient, Failure

START_S: Final = 120.0
STOP_S: Final = 60.0
POLL_S: Final = 0.05


class TemporaryDaemon:
    """A context manager. `client` and `socket` are good while it runs."""

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        """`settings`: dotted key to value; nothing else, the environment's included, counts."""
        self._log = folder / "kvbm-daemon.log"
        self._runtime = Path(tempfile.mkdtemp(prefix="kvbm-bench-"))  # a socket's path is short
        self.socket = self._runtime / "s"
        given = {
            **settings,
            "socket": self.socket,
            "admin.port": 0,
            "log.format": "json",
        }
        options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        self._command = [sys.executable, "-m", "kvbm.daemon", "serve", *options]
        self._child: subprocess.Popen[bytes] | None = None
        self.client: AdminClient

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        shutil.rmtree(self._runtime, ignore_errors=True)

    def restart(self) -> None:
        """A clean end, and a new start with what the SSD kept."""
        self._stop()
        self._start()

    def _start(self) -> None:
        environ = {name: value for name, value in os.environ.items() if name[:5] != "KVBM_"}
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ
            )
        end = time.monotonic() + START_S
        while (url := self._admin_url()) is None:
            if self._child.poll() is not None or time.monotonic() > end:
                text = self._log.read_text(errors="replace").strip()
                raise Failure(f"the temporary daemon is not ready; it says:\n{text[-2000:]}")
            time.sleep(POLL_S)
        self.client = AdminClient(url, None)

    def _admin_url(self) -> str | None:
        """Where the daemon says that it is, once it is ready."""
        for line in self._log.read_text(errors="replace").splitlines():
            if line.startswith("{") and line.endswith("}"):
                told = json.loads(line)
                if told["event"] == "ready":
                    return str(told["admin"])
        return None

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
