"""The demo's stack left running: `up` starts a holder apart from the terminal, `down` ends it.

The holder is this program again; it keeps the stack as long as it lives, and its record names it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from examples.demo.client import SERVED_NAME
from examples.demo.process import ProcessError, end_recorded, recorded, start_time
from examples.demo.stack import HOLDER, Say, Stack

UP_TIMEOUT_S = 900.0
# The holder ends engines, daemon and servers before it ends itself.
DOWN_GRACE_S = 120.0


def up(build: Path, model: str, more_engines: int) -> int:
    """Start the holder and wait until everything is ready; prints where it can be reached."""
    if _held_by(build) is not None and _addresses(build).exists():
        print("it is up already:")
    else:
        _addresses(build).parent.mkdir(parents=True, exist_ok=True)
        _addresses(build).unlink(missing_ok=True)
        log = build / "logs" / "up.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            holder = subprocess.Popen(
                [
                    *(sys.executable, "-m", "examples.demo", "hold"),
                    *("--more-engines", str(more_engines)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=build.parent,
                env={**os.environ, "MODEL": model},
            )
        try:
            _follow(holder, log, _addresses(build))
        except BaseException:
            holder.terminate()
            holder.wait(DOWN_GRACE_S)
            raise
    _print(json.loads(_addresses(build).read_text()))
    return 0


def hold(build: Path, model: str, more_engines: int, say: Say) -> int:
    """Run the stack until told to end; what `up` starts."""
    with Stack(build, model, say, more_engines=more_engines) as stack:
        try:
            _addresses(build).write_text(json.dumps(dict(stack.addresses())))
            while True:
                time.sleep(1.0)
                stack.check()
        finally:
            _addresses(build).unlink(missing_ok=True)


def down(build: Path) -> int:
    """End what `up` started, and anything a killed run has left."""
    ended = []
    pid = _held_by(build)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + DOWN_GRACE_S
        while start_time(pid) is not None and time.monotonic() < deadline_s:
            time.sleep(0.1)
        ended.append("the stack")
    ended += end_recorded(build / "run")
    print(f"ended {', '.join(ended)}" if ended else "nothing was up")
    return 0


def _follow(holder: subprocess.Popen[bytes], log: Path, addresses: Path) -> None:
    """Show the holder's progress until its addresses are there."""
    deadline_s = time.monotonic() + UP_TIMEOUT_S
    with log.open() as lines:
        while not addresses.exists():
            has_ended = holder.poll() is not None
            print(lines.read(), end="", flush=True)
            if has_ended:
                raise ProcessError(f"the stack did not come up; see {log}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the stack was not up after {UP_TIMEOUT_S:.0f} s")
            time.sleep(0.2)


def _print(addresses: Mapping[str, str]) -> None:
    openai = addresses["openai"]
    body = {"model": SERVED_NAME, "messages": [{"role": "user", "content": "Hello"}]}
    print(f"\nan OpenAI endpoint over two engines, at {openai}:\n")
    print(f"  curl -si {openai}/chat/completions \\")
    print(f"    -H 'content-type: application/json' -d '{json.dumps(body)}'\n")
    print(f"  OpenAI(base_url={openai!r}, api_key='none')\n")
    print("for operators:\n")
    for name, address in addresses.items():
        if name != "openai":
            print(f"  {name:<12} {address}")
    print("\nend it with `make down`")


def _held_by(build: Path) -> int | None:
    """The pid of whoever runs a stack."""
    return recorded(build / "run" / HOLDER)


def _addresses(build: Path) -> Path:
    return build / "run" / "addresses.json"
