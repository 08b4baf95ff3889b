"""What the connector costs an engine that finds nothing to reuse, on a real engine.

Two engines serve the demo's model, one with the connector and one without. In turns each gets a few
prompts that nobody has seen, one behind the other, so that the one with the connector asks in vain
and stores all it computed, through to the SSD, while it computes the next. Told are tokens of the
prompts a second of such a turn, against the engine without the connector, and against the same
engine while its daemon is away: two processes of one program differ here by a tenth, from start to
start, and that row does without. (CPU seconds would say nothing: vLLM's processes spin while they
wait for each other.)

Both reserve one core for what is not the model: by itself vLLM's CPU build reserves one more for an
engine with a connector, and where that leaves none it gives the model every core instead.

    python -m benchmarks.engine_overhead [--rounds 10] [--tokens 512]
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
from dataclasses import dataclass
from pathlib import Path

from examples.demo.daemon import Daemon, DaemonConfig
from examples.demo.engine import Engine, EngineConfig
from examples.demo.model import model_path
from kvbm.cli.figures import Row, compared, tell

TARGET = 1 / 1.02  # at most 2 % more time
ANSWER_TOKENS = 8
WARM_UPS = 2
VOCABULARY = range(1000, 40000)  # plain tokens of the demo's model
ALIKE = (("VLLM_CPU_NUM_OF_RESERVED_CPU", "1"),)
TURN_PROMPTS = 4
RECONNECT_S = 3.0  # at most what the connector lets pass between two attempts
REST_S = 1.0  # after a turn, so that what is stored behind it does not fall into the other's


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int
    tokens: int  # of each prompt


def turn(engine: Engine, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds until the last of these was answered, each asked when the one before was."""
    start = time.perf_counter()
    for prompt in prompts:
        answer = engine.complete(prompt, max_tokens=ANSWER_TOKENS)
        assert answer.cached_tokens == 0, "the prompt was to be new"
    seconds = time.perf_counter() - start
    time.sleep(REST_S)
    return seconds


def measure(with_it: Engine, without: Engine, daemon: Daemon, plan: Plan) -> list[Row]:
    generator = random.Random(20)
    rates: dict[str, list[float]] = defaultdict(list)

    def rate(engine: Engine) -> float:
        prompts = [generator.choices(VOCABULARY, k=plan.tokens) for _ in range(TURN_PROMPTS)]
        return TURN_PROMPTS * plan.tokens / turn(engine, prompts)

    for round_ in range(WARM_UPS + plan.rounds):
        found = {"kept": rate(with_it), "none": rate(without)}
        assert daemon.kept_chunks()["G2"] > 0, "the connector stored nothing"
        daemon.process.stop()
        found["away"] = rate(with_it)
        daemon.start()
        time.sleep(RECONNECT_S)
        for name, value in found.items() if round_ >= WARM_UPS else ():
            rates[name].append(value)
    name = f"tokens a second, prompts of {plan.tokens} new"
    return [
        compared(name, "1/s", rates["kept"], "no connector", rates["none"], TARGET),
        compared(name, "1/s", rates["kept"], "no daemon, same engine", rates["away"], TARGET),
    ]


def run(plan: Plan) -> list[Row]:
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
            Engine(name, EngineConfig(model, path, environment=ALIKE), logs=folder, records=folder)
            for name, path in (("with", socket), ("without", None))
        ]
        for engine in engines:  # side by side: a start is mostly imports
            running.callback(engine.stop)
            engine.start()
        for engine in engines:
            took_s = engine.wait_ready()
            print(f"engine {engine.name} the connector: ready, {took_s:.0f} s", file=sys.stderr)
        return measure(engines[0], engines[1], daemon, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt")
    arguments = parser.parse_args()
    tell("engine_overhead", run(Plan(arguments.rounds, arguments.tokens)))


if __name__ == "__main__":
    main()
