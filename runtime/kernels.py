"""Compiled kernels made ready beside an event loop that answers meanwhile.

At the first start on a machine they are compiled, which takes a minute; then they are kept on disk
(`runtime.native`), and later starts take a second or two, most of it numba's import.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final

import structlog

WHY: Final = "compiling kernels: a minute at the first start on a machine, then they are kept"
QUICK_S: Final = 10.0  # less is not worth a line in the log

_log = structlog.get_logger()


async def compiled(modules: Sequence[str]) -> None:
    """Once these modules are imported, whose kernels are compiled by that.

    A cancelled caller is not waited for: the thread that compiles ends with the process.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def load() -> None:
        error: BaseException | None = None
        try:
            with _hidden("scipy.linalg"):
                for module in modules:
                    importlib.import_module(module)
        except Exception as failure:  # noqa: BLE001 (it is the caller's)
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            loop.call_soon_threadsafe(settle, error)

    began_s = time.monotonic()
    threading.Thread(target=load, name="kernels", daemon=True).start()
    try:
        async with asyncio.timeout(QUICK_S):
            await asyncio.shield(done)
    except TimeoutError:
        _log.info("compiling_kernels", why=WHY)
        await done
    took_s = time.monotonic() - began_s
    _log.info("kernels_ready", seconds=round(took_s, 1))


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """As if it were not installed: numba imports SciPy's linear algebra where it is, which takes
    half as long as all kernels and serves products of matrices, of which they have none."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
