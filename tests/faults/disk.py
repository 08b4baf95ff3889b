"""A small filesystem of a test's own, which can be filled to the last byte without harm."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Self

from tests.waiting import wait_until

_WAIT_S = 60.0


class SmallDisk:
    """A tmpfs mounted at `path`, seen only by programs started with `prefix` before their command.

    Made in a user and a mount namespace of its own, so that nobody needs to be root.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        script = 'mount -t tmpfs -o "size=$1,mode=700" tmpfs "$0" && echo made && exec sleep inf'
        path.mkdir(parents=True)
        self._holder = subprocess.Popen(
            ["unshare", "-Urm", "sh", "-c", script, str(path), str(size_bytes)],
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"made\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()

    @property
    def prefix(self) -> list[str]:
        return ["nsenter", "-t", str(self._holder.pid), "-U", "-m", "--preserve-credentials"]

    @property
    def inside(self) -> Path:
        """The mount as it can be reached from here."""
        return Path(f"/proc/{self._holder.pid}/root{self._path}")

    def fill(self) -> None:
        """Leave not a page free."""
        with (self.inside / "ballast").open("ab", buffering=0) as file:
            for step in (1 << 20, 4096):
                with contextlib.suppress(OSError):
                    while file.write(bytes(step)) == step:
                        pass
        wait_until(self._is_full, _WAIT_S, "the filesystem is full")

    def empty(self) -> None:
        (self.inside / "ballast").unlink()

    def punch(self, name: str) -> None:
        """Give a file's blocks back to the filesystem; it reads as zeros then."""
        path = self.inside / name
        size = path.stat().st_size
        subprocess.run(["fallocate", "-p", "-o", "0", "-l", str(size), path], check=True)

    def _is_full(self) -> bool:
        probe = self.inside / "probe"
        try:
            with probe.open("wb", buffering=0) as file:
                file.write(bytes(4096))
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            probe.unlink(missing_ok=True)
        return False


def cannot_mount() -> str | None:
    """Why this machine lets nobody mount a tmpfs of their own; None if it does."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return "unshare and nsenter are not installed"
    tried = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return tried.stderr.strip() or f"status {tried.returncode}" if tried.returncode else None


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
        os.fsync(file.fileno())
