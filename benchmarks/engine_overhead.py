"""What the connector costs an engine that finds nothing to reuse: a real engine with, one without.

Both serve the demo's model on this machine. In turns each gets one prompt that nobody has seen, so
that the one with the connector asks in vain and then stores all it computed, through to the SSD.
Told are prompt tokens a second of wall time, to the end of the answer, and of the engine's own CPU
time (all its processes, the storing behind the answer included): on a machine that others use only
the latter says something. The daemon's CPU time is its own and counts in the former alone.

    python -m benchmarks.engine_overhead [--rounds 30] [--tokens 512]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from examples.demo.daemon import Daemon, DaemonConfig
from examples.demo.engine import Engine, EngineConfig
from examples.demo.model import model_path
from kvbm.cli.figures import Row, compared, tell

TARGET = 1 / 1.02  # at most 2 % more time
ANSWER_TOKENS = 8
WARM_UPS = 2
VOCABULARY = range(1000, 40000)  # plain tokens of the demo's model
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
BEHIND_S = 0.5  # from the answer until what is done behind it has been done


def cpu_s(root: int) -> float:
    """CPU seconds of a process and all that descend from it, ended children included."""
    children: dict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        pid = int(entry.name)
        children[int(fields[1])].append(pid)
        ticks[pid] = sum(int(field) for field in fields[11:15])
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        total += ticks.get(pid, 0)
        waiting += children[pid]
    return total * TICK_S


def ask(engine: Engine, prompt: Sequence[int]) -> tuple[float, float]:
    """Wall seconds to the end of the answer, CPU seconds of the engine until it rests."""
    before = cpu_s(engine.process.pid)
    answer = engine.complete(prompt, max_tokens=ANSWER_TOKENS)
    assert answer.cached_tokens == 0, "the prompt was to be new"
    time.sleep(BEHIND_S)
    return answer.total_s, cpu_s(engine.process.pid) - before


def measure(with_it: Engine, without: Engine, rounds: int, tokens: int) -> list[Row]:
    generator = random.Random(20)
    wall: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    sides = [with_it, without]
    for round_ in range(WARM_UPS + rounds):
        for engine in sides if round_ % 2 else sides[::-1]:
            seconds, busy = ask(engine, generator.choices(VOCABULARY, k=tokens))
            if round_ >= WARM_UPS:
                wall[engine.name].append(tokens / seconds)
                cpu[engine.name].append(tokens / busy)
    return [
        compared(
            f"tokens a {unit}, {tokens} new",
            "1/s",
            rates[with_it.name],
            "no connector",
            rates[without.name],
            TARGET,
        )
        for unit, rates in (("second", wall), ("CPU second", cpu))
    ]


def run(rounds: int, tokens: int) -> list[Row]:
    build = Path("build")
    model = os.environ.get("MODEL") or str(model_path(build / "models"))
    build.mkdir(exist_ok=True)
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(dir=build.absolute())))
        socket = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="kvbm-"))) / "s"
        daemon = Daemon(DaemonConfig(folder=folder, socket=socket, logs=folder, records=folder))
        running.callback(daemon.process.stop)
        daemon.start()
        engines = [
            Engine(name, EngineConfig(model, path), logs=folder, records=folder)
            for name, path in (("with", socket), ("without", None))
        ]
        for engine in engines:  # side by side: a start is mostly imports
            running.callback(engine.stop)
            engine.start()
        for engine in engines:
            took_s = engine.wait_ready()
            print(f"engine {engine.name} the connector: ready, {took_s:.0f} s", file=sys.stderr)
        rows = measure(engines[0], engines[1], rounds, tokens)
        kept = daemon.kept_chunks()
        assert kept["G2"] > 0, f"the connector stored nothing: {kept}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt")
    arguments = parser.parse_args()
    tell("engine_overhead", run(arguments.rounds, arguments.tokens))


if __name__ == "__main__":
    main()
