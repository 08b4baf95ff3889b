"""What the frontend costs: its processor time for a request and for a streamed event.

Mock engines that answer at once (four in one process), one load generator in a process of its own,
and in turn before them: the frontend passing through, the frontend making answers from tokens, a
bare relay of uvicorn and aiohttp, and the reference's frontend with its own mock
engines where KVBM_BENCH_REFERENCE names a virtual environment with ai-dynamo 1.6.1. Prompts are
words of random letters. The clients acknowledge at once, so that nobody waits for a delayed ACK.

    python -m benchmarks.frontend [--rounds 3] [--requests 384] [--only passed,tokens]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.frontend_load import MODEL, Load, Loaded
from kvbm.cli.figures import Row, bounded, compared, tell
from runtime.server_process import free_ports

ENGINES: Final = 4
BLOCK_TOKENS: Final = 16
START_S: Final = 120.0
_CLOCK_SCHED: Final = 2  # CPUCLOCK_SCHED: with a process's number, its clock (clock_getcpuclockid)
REFERENCE: Final = "KVBM_BENCH_REFERENCE"
TEMPLATE: Final = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
)

SHORT, LONG = 66, 16  # words of a prompt of 200 tokens, and behind a beginning of 3000
PREFIX: Final = 970
WORKLOADS: Final = {
    "200 tokens": Load(0, 0, 64, SHORT),
    "3k tokens": Load(0, 0, 64, LONG, PREFIX),
    "200 tokens, 32 streamed": Load(0, 0, 64, SHORT, tokens=32, stream=True),
    "3k tokens, 32 streamed": Load(0, 0, 64, LONG, PREFIX, tokens=32, stream=True),
}
CONCURRENCIES: Final = (1, 16)
"""Besides 64, for latency, of the first workload."""


@dataclass(frozen=True)
class System:
    name: str
    port: int
    process: subprocess.Popen[bytes]
    engines: subprocess.Popen[bytes]

    def cpu_s(self) -> tuple[float, float]:
        return cpu_s(self.process.pid), cpu_s(self.engines.pid)


@dataclass(frozen=True)
class Figures:
    loaded: Loaded
    requests: int
    cpu_us: float  # of a request
    engines_us: float

    @property
    def event_us(self) -> float:
        """All of the request's, on its events."""
        return self.cpu_us * self.requests / self.loaded.events


# -- processes ----------------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    """A byte-level tokenizer of pairs and triples of letters: about three tokens for a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters, blank = ascii_lowercase, "\u0120"
    pairs = [(a, b) for a, b in product((blank, *letters), letters)]
    triples = [(a + b, c) for (a, b), c in product(pairs, letters)]
    fours = [(blank + a + b, c) for a, b, c in product(letters, repeat=3)]
    merges = [*pairs, *triples, *fours]
    tokens = ["<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "max_position_embeddings": 131072,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 131072,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


@contextlib.contextmanager
def process(
    log: Path, command: Sequence[str], environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        made = subprocess.Popen(command, stdout=out, stderr=out, env=environ)
    try:
        yield made
    finally:
        made.terminate()
        try:
            made.wait(30)
        except subprocess.TimeoutExpired:
            made.kill()
            made.wait()


def ours(stack: contextlib.ExitStack, folder: Path, model: Path) -> list[System]:
    bind, *ports = free_ports(6)
    address = f"tcp://127.0.0.1:{bind}"
    found = {"file_directory": str(folder / "found")}
    engines = _ours(
        stack,
        folder / "engines.log",
        "mocker",
        {
            "discovery": found,
            "events": {"plane": "zmq", "zmq_bind": address},
            "model": MODEL,
            "engines": ENGINES,
            "block_tokens": BLOCK_TOKENS,
            "speedup": 1e6,
        },
    )
    ready = _line(folder / "engines.log", '"ready"', engines)
    urls = [one["url"] for one in json.loads(ready)["engines"]]
    systems = []
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("passed", {"index": {"source": "routes"}}),  # the engines' tokens are their own
        ("tokens", {"tokens_for": [MODEL]}),
    ]
    for number, (name, settings) in enumerate(kinds):
        port, operators = ports[2 * number : 2 * number + 2]
        given = {
            "discovery": found,
            "events": {"plane": "zmq", "zmq_peers": [address]},
            "openai": {"port": port},
            "http": {"port": operators},
            "model_paths": {MODEL: str(model)},
            **settings,
        }
        made = _ours(stack, folder / f"{name}.log", "frontend", given)
        systems.append(System(name, port, made, engines))
    command = [sys.executable, "-m", "benchmarks.frontend_load", "relay", str(ports[4]), *urls]
    made = stack.enter_context(process(folder / "relay.log", command))
    systems.append(System("relay", ports[4], made, engines))
    return systems


def reference(stack: contextlib.ExitStack, folder: Path, model: Path, venv: Path) -> System:
    (port,) = free_ports(1)
    plane = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    loopback = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST")
    environ = {
        **os.environ,
        **dict.fromkeys(loopback, "127.0.0.1"),
        "DYN_LOG": "error,request_span=off",
    }
    environ |= {"DYN_FILE_KV": str(folder / "reference"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    python = [str(venv / "bin" / "python"), "-m"]
    command = [*python, "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL, *plane]
    command += ["--num-workers", str(ENGINES), "--block-size", str(BLOCK_TOKENS)]
    command += ["--speedup-ratio", "1000000"]  # 0 is not infinite
    engines = stack.enter_context(process(folder / "reference-engines.log", command, environ))
    command = [*python, "dynamo.frontend", "--router-mode", "kv", "--http-host", "127.0.0.1"]
    command += ["--http-port", str(port), "--kv-cache-block-size", str(BLOCK_TOKENS), *plane]
    made = stack.enter_context(process(folder / "reference.log", command, environ))
    return System("reference", port, made, engines)


def _ours(
    stack: contextlib.ExitStack, log: Path, program: str, settings: Mapping[str, Any]
) -> subprocess.Popen[bytes]:
    file = log.with_suffix(".yaml")
    file.write_text(json.dumps(settings))  # which is YAML
    command = [sys.executable, "-m", program, "serve", "--config", str(file)]
    return stack.enter_context(process(log, command))


def _line(log: Path, mark: str, made: subprocess.Popen[bytes]) -> str:
    end_at = time.monotonic() + START_S
    while time.monotonic() < end_at and made.poll() is None:
        found = [line for line in log.read_text().splitlines() if mark in line]
        if found:
            return found[0]
        time.sleep(0.1)
    raise SystemExit(f"did not start: {log.read_text()}")


def answers(system: System, folder: Path) -> None:
    """Wait until it does."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    url = f"http://127.0.0.1:{system.port}/v1/chat/completions"
    request = urllib.request.Request(
        url, json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    end_at, why = time.monotonic() + START_S, ""
    while time.monotonic() < end_at and system.process.poll() is None:
        try:
            urllib.request.urlopen(request, timeout=10).read()
        except (urllib.error.URLError, OSError) as error:
            why = str(error)
            time.sleep(0.3)
        else:
            return
    logs = "".join(path.read_text()[-2000:] for path in folder.glob(f"{system.name}*.log"))
    raise SystemExit(f"{system.name} does not answer: {why}\n{logs}")


# -- measuring ----------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Of all its threads, to the nanosecond: /proc counts in ticks of 10 ms."""
    return time.clock_gettime((~pid << 3) | _CLOCK_SCHED)


def measured(system: System, load: Load) -> Figures:
    load = replace(load, port=system.port)
    before = system.cpu_s()
    command = [sys.executable, "-m", "benchmarks.frontend_load", json.dumps(asdict(load))]
    told = subprocess.run(command, capture_output=True, check=False)
    if told.returncode:
        raise SystemExit(f"{system.name}: {told.stderr.decode()[-2000:]}")
    after = system.cpu_s()
    spent = [(b - a) / load.requests * 1e6 for a, b in zip(before, after, strict=True)]
    return Figures(Loaded(**json.loads(told.stdout)), load.requests, *spent)


def run(systems: Sequence[System], rounds: int, requests: int) -> dict[str, dict[str, Any]]:
    """Figures of rounds, by workload and system."""
    loads = {name: replace(load, requests=requests) for name, load in WORKLOADS.items()}
    for count in CONCURRENCIES:
        some = replace(loads["200 tokens"], concurrency=count, requests=requests // 2)
        loads[f"200 tokens, {count} at a time"] = some
    found: dict[str, dict[str, Any]] = {name: {} for name in loads}
    for system in systems:
        for load in loads.values():
            measured(system, replace(load, requests=128, seed=999))
    for number in range(rounds):
        for name, load in loads.items():
            # In turns of who is first: what the machine does meanwhile falls on all alike.
            for system in systems[:: 1 if number % 2 else -1]:
                figures = measured(system, replace(load, seed=1000 + number))
                found[name].setdefault(system.name, []).append(figures)
                row = f"{name:<26} {system.name:<10} {figures.cpu_us:>7.0f} us/request"
                print(f"{row} {figures.loaded.per_s:>6.0f}/s", file=sys.stderr)
    return found


def rows(found: Mapping[str, Mapping[str, Sequence[Figures]]]) -> list[Row]:
    made: list[Row] = []
    for workload, systems in found.items():
        streamed = "streamed" in workload
        theirs = systems.get("reference")
        for name, rounds in systems.items():
            if name == "reference":
                continue
            figures = [one.event_us if streamed else one.cpu_us for one in rounds]
            title = f"{name}: CPU of {'an event' if streamed else 'a request'}, {workload}"
            if theirs is None:
                made.append(bounded(title, "us", figures, None))
            else:
                peer = [one.event_us if streamed else one.cpu_us for one in theirs]
                row = compared(title, "us", figures, "reference", peer)
                halved = name == "relay" or row["ratio"] <= 0.5
                made.append({**row, "target": None if name == "relay" else 0.5, "ok": halved})
        for name, rounds in systems.items():
            made += _seen(f"{name}: %s, {workload}", rounds, streamed=streamed)
    return made


def _seen(title: str, rounds: Sequence[Figures], *, streamed: bool) -> list[Row]:
    """What is told without a target."""
    columns = {
        "requests": ("/s", [one.loaded.per_s for one in rounds]),
        "p50": ("ms", [one.loaded.p50_ms for one in rounds]),
        "p99": ("ms", [one.loaded.p99_ms for one in rounds]),
        "engines' CPU": ("us", [one.engines_us for one in rounds]),
    }
    if streamed:
        columns["first token p50"] = ("ms", [one.loaded.ttft_p50_ms for one in rounds])
        columns["first token p99"] = ("ms", [one.loaded.ttft_p99_ms for one in rounds])
    return [bounded(title % name, unit, some, None) for name, (unit, some) in columns.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=384, help="of each load")
    parser.add_argument("--only", help="systems, separated by commas")
    given = parser.parse_args()
    venv = os.environ.get(REFERENCE)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbm-frontend-")))
        model = model_folder(folder / "model")
        systems = ours(stack, folder, model)
        if venv:
            systems.append(reference(stack, folder, model, Path(venv)))
        else:
            print(f"without the reference: {REFERENCE} names no environment", file=sys.stderr)
        if given.only:
            systems = [one for one in systems if one.name in given.only.split(",")]
        for system in systems:
            answers(system, folder)
        found = run(systems, given.rounds, given.requests)
    load = statistics.fmean(os.getloadavg())
    table = rows(found)
    table.append(bounded("the machine's load, mean of 1, 5 and 15 minutes", "", [load], None))
    tell("frontend", table)


if __name__ == "__main__":
    main()
