"""vLLM's own event publisher in processes of their own, told line by line what to publish.

Run as a program: imports vLLM once, which takes seconds, forks a process for each engine it hears
of, and answers each JSON command with a line. Commands: start, publish, events, kinds, kill; the
last is a `kill -9`, to an engine's listeners its crash.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)


def stored(number: int, blocks: int) -> BlockStored:
    """Recognisable by `number`: the hashes count from number * 1000."""
    first = number * 1000
    return BlockStored(
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
            return BlockStored(
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
            return BlockRemoved(block_hashes=list(hashes), medium="GPU", group_idx=0)
    return AllBlocksCleared()


def serve(commands: Connection) -> None:
    """One engine."""
    publishers: dict[int, ZmqEventPublisher] = {}
    while True:
        command: dict[str, Any] = commands.recv()
        rank = command.get("rank", 0)
        match command["do"]:
            case "start":
                publishers[rank] = ZmqEventPublisher(rank, **command["options"])
            case "publish":
                for number in range(*command["numbers"]):
                    event = stored(number, command.get("blocks", 2))
                    publishers[rank].publish(KVEventBatch(ts=float(number), events=[event]))
            case "events":
                events = [event_of(*fields) for fields in command["events"]]
                publishers[rank].publish(KVEventBatch(ts=1.0, events=events))
            case "kinds":
                removed = BlockRemoved(block_hashes=[b"\x01" * 32, 5], medium="CPU", group_idx=1)
                events = [stored(7, 1), removed, AllBlocksCleared()]
                publishers[rank].publish(KVEventBatch(ts=1.5, events=events))
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
                engines[name] = (process, ours)
            engines[name][1].send(command)
            engines[name][1].recv()
        say("done")


def say(word: str) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
