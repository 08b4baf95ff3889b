"""vLLM's own event publisher in processes of their own, told line by line what to publish.

Run as a program: forks a process for each engine it hears of, and answers each JSON command with a
line. Commands: start, publish, events, kinds, kill; the last is a `kill -9`, to its listeners the
crash of an engine.

Of vLLM only the publisher's own module and the two small ones it uses are run: importing all of
vLLM takes PyTorch's compiler along, a minute on a busy machine, for nothing that is used here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import sys
import time
import types
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

_PACKAGES = ("vllm", "vllm.config", "vllm.distributed", "vllm.utils", "vllm.v1", "vllm.v1.core")


def _kv_events() -> Any:
    """vLLM's module, with its packages empty, and a type and a plain record stood in for."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    for name in _PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    for name, attribute, value in (
        ("vllm.config.kv_events", "KVEventsConfig", types.SimpleNamespace),
        ("vllm.v1.core.kv_cache_utils", "ExternalBlockHash", bytes | int),
    ):
        module = sys.modules[name] = types.ModuleType(name)
        setattr(module, attribute, value)
    return importlib.import_module("vllm.distributed.kv_events")


vllm_events = _kv_events()


def stored(number: int, blocks: int) -> Any:
    """Recognisable by `number`: the hashes count from number * 1000."""
    first = number * 1000
    return vllm_events.BlockStored(
        block_hashes=list(range(first, first + blocks)),
        parent_block_hash=first - 1 if first else None,
        token_ids=list(range(first, first + 16 * blocks)),
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        group_idx=0,
    )


def event_of(kind: str, hashes: Any = (), parent: int | None = None, tokens: Any = ()) -> Any:
    """Of blocks of 16 tokens."""
    match kind:
        case "stored":
            return vllm_events.BlockStored(
                block_hashes=list(hashes),
                parent_block_hash=parent,
                token_ids=list(tokens),
                block_size=16,
                lora_id=None,
                medium="GPU",
                lora_name=None,
                group_idx=0,
            )
        case "removed":
            return vllm_events.BlockRemoved(block_hashes=list(hashes), medium="GPU", group_idx=0)
    return vllm_events.AllBlocksCleared()


def serve(commands: Connection) -> None:
    """One engine."""
    publishers: dict[int, Any] = {}
    while True:
        command: dict[str, Any] = commands.recv()
        rank = command.get("rank", 0)
        match command["do"]:
            case "start":
                publishers[rank] = vllm_events.ZmqEventPublisher(rank, **command["options"])
            case "publish":
                for number in range(*command["numbers"]):
                    event = stored(number, command.get("blocks", 2))
                    publishers[rank].publish(
                        vllm_events.KVEventBatch(ts=float(number), events=[event])
                    )
            case "events":
                events = [event_of(*fields) for fields in command["events"]]
                publishers[rank].publish(vllm_events.KVEventBatch(ts=1.0, events=events))
            case "kinds":
                removed = vllm_events.BlockRemoved(
                    block_hashes=[b"\x01" * 32, 5], medium="CPU", group_idx=1
                )
                events = [stored(7, 1), removed, vllm_events.AllBlocksCleared()]
                publishers[rank].publish(vllm_events.KVEventBatch(ts=1.5, events=events))
        # The publisher's thread has a queue; an answer means it is empty.
        while publishers[rank]._event_queue.unfinished_tasks:
            time.sleep(0.001)
        commands.send("done")


def main() -> None:
    engines: dict[str, tuple[ForkProcess, Connection]] = {}
    fork = multiprocessing.get_context("fork")
    say("ready")
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        name = command["engine"]
        if command["do"] == "kill":
            process, _ = engines.pop(name)
            process.kill()
            process.join()
        else:
            if name not in engines:
                ours, theirs = fork.Pipe()
                process = fork.Process(target=serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()  # an engine that ends is then noticed, not waited for
                engines[name] = (process, ours)
            engines[name][1].send(command)
            engines[name][1].recv()
        say("done")


def say(word: str) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
