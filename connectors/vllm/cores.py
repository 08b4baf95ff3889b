"""Which of the machine's cores our threads in an engine's worker run on."""

from __future__ import annotations

import contextlib
import os


def leave_the_models_core() -> None:
    """Move the calling thread off the cores that its process was bound to within its parent's.

    vLLM's CPU build binds a worker's main thread to the first of the cores it computes on, and a
    thread inherits that from its maker: a copy there would stop the model. Elsewhere are the cores
    vLLM reserves for such work. Does nothing where the process may run wherever its parent may.
    """
    with contextlib.suppress(OSError):  # the parent has ended, or the cores are not for us
        elsewhere = os.sched_getaffinity(os.getppid()) - os.sched_getaffinity(0)
        if elsewhere:
            os.sched_setaffinity(0, elsewhere)
