"""Routers of one model tell each other what they sent where, so that all count the same load.

Outputs are told, too. What the others say is followed by `Peers`, which heals what was lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import msgspec

from router.index import WorkerId
from router.load import Active, ActiveSequences
from router.peers import (
    ASK_AGAIN_S,
    SIGN_OF_LIFE_S,
    SILENCE_S,
    Ask,
    Begun,
    Change,
    Changes,
    Ended,
    Grew,
    Peers,
    PeerStatus,
    Prefilled,
    ReplicaCounts,
    State,
    decode,
    encode,
    subject_of,
)
from router.workers import Workers
from runtime.events.base import EventPlane, Message

LINGER_S: Final = 0.001
BATCH_CHANGES: Final = 256
STATE_SEQUENCES: Final = 128  # in one message; a prompt of 8 k tokens is 5 KB
PARKED_MAX: Final = 4096


class ReplicatedLoad:
    """The load of all routers' requests. Same calls as `ActiveSequences`, for this router's own.

    All methods are called from one event loop. `name` is this router's, unique among them; `epoch`
    grows with each run of it.
    """

    def __init__(
        self,
        workers: Workers,
        active: ActiveSequences,
        plane: EventPlane,
        *,
        namespace: str,
        model: str,
        name: str,
        epoch: int,
        silence_s: float = SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = ReplicaCounts()
        self._workers = workers
        self._active = active
        self._plane = plane
        self._subject = subject_of(namespace, model)
        self._name = name
        self._epoch = epoch
        self._peers = Peers(self, self.counts, silence_s, clock)
        self._next = 0
        self._batch: list[Change] = []
        self._timer: asyncio.TimerHandle | None = None
        self._own: dict[str, Begun] = {}
        self._parked: dict[str, Begun] = {}  # others' sequences on workers not registered here

    async def run(self) -> None:
        """Until cancelled: hear the others, and be heard."""
        async with self._plane.subscribe(self._subject) as messages, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            async for message in messages:
                self.hear(message)

    async def _watch(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(min(SIGN_OF_LIFE_S, ASK_AGAIN_S))

    # -- this router's requests ----------------------------------------------------------

    def begin(self, request: str, sequence: Active) -> bool:
        if not self._active.begin(self._key(self._name, request), sequence):
            return False
        worker = self._workers.at(sequence.row).id
        begun = Begun(
            request,
            worker.instance,
            worker.dp_rank,
            list(sequence.prompt),
            sequence.blocks,
            sequence.prefill_tokens,
            sequence.prefill_s,
        )
        self._own[request] = begun
        self._tell(begun)
        return True

    def prefilled(self, request: str, *, timed: bool = True) -> bool:
        return self._change(request, Prefilled(request, timed))

    def grow(self, request: str, blocks: int = 1) -> bool:
        return self._change(request, Grew(request, blocks))

    def end(self, request: str) -> bool:
        return self._change(request, Ended(request))

    # -- workers -------------------------------------------------------------------------

    def worker_added(self, worker: WorkerId) -> None:
        """Others' sequences that were waiting for it count from now on."""
        for key, begun in list(self._parked.items()):
            if (begun.instance, begun.dp_rank) == (worker.instance, worker.dp_rank):
                del self._parked[key]
                self._take(key, begun)

    def worker_removed(self, row: int) -> list[str]:
        """This router's requests that were on it. Each router notices for itself."""
        mine = self._key(self._name, "")
        ended = [
            key.removeprefix(mine)
            for key in self._active.worker_removed(row)
            if key.startswith(mine)
        ]
        for request in ended:
            self._own.pop(request, None)
            self._tell(Ended(request))
        return ended

    def peers(self) -> list[PeerStatus]:
        return self._peers.status()

    # -- the plane -----------------------------------------------------------------------

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        changes, self._batch = self._batch, []
        self._publish(Changes(self._name, self._epoch, self._next - len(changes), changes))

    def hear(self, message: Message) -> None:
        """Take one message of another router; malformed ones are counted."""
        match decode(message.payload):
            case None:
                self.counts.malformed += 1
            case Ask(router):
                if router == self._name:
                    self._send_state()
            case Changes() as changes if changes.router != self._name:
                self._peers.follow(changes)
            case State() as state if state.router != self._name:
                self._peers.take(state)

    def tick(self) -> None:
        """At least every `SIGN_OF_LIFE_S`: be heard, ask again, forget the silent."""
        self.flush()
        self._peers.tick()

    # -- what others say: `Listener` -----------------------------------------------------

    def happened(self, router: str, change: Change) -> None:
        key = self._key(router, change.request)
        if key in self._parked and not isinstance(change, Begun):
            self._parked[key] = _changed(self._parked[key], change)
        if isinstance(change, Ended):
            self._parked.pop(key, None)
        self._apply(key, change)

    def runs(self, router: str, begun: Begun) -> None:
        self._take(self._key(router, begun.request), begun)

    def forget(self, router: str, request: str) -> None:
        key = self._key(router, request)
        self._parked.pop(key, None)
        self._active.end(key)

    def ask(self, router: str) -> None:
        self._publish(Ask(router))

    # -- inside --------------------------------------------------------------------------

    @staticmethod
    def _key(router: str, request: str) -> str:
        return f"{router}\0{request}"

    def _change(self, request: str, change: Change) -> bool:
        known = self._apply(self._key(self._name, request), change)
        if known:
            self._own[request] = _changed(self._own[request], change)
            if isinstance(change, Ended):
                del self._own[request]
            self._tell(change)
        return known

    def _tell(self, change: Change) -> None:
        self._next += 1
        self._batch.append(change)
        if len(self._batch) >= BATCH_CHANGES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self.flush)

    def _publish(self, message: Changes | Ask | State) -> None:
        if not self._plane.publish(self._subject, encode(message)):
            self.counts.unpublished += 1

    def _apply(self, key: str, change: Change) -> bool:
        match change:
            case Begun():
                return self._take(key, change)
            case Prefilled():
                return self._active.prefilled(key)
            case Grew(_, blocks):
                return self._active.grow(key, blocks)
            case Ended():
                return self._active.end(key)

    def _take(self, key: str, begun: Begun) -> bool:
        worker = WorkerId(begun.instance, begun.dp_rank)
        if worker not in self._workers:
            if len(self._parked) < PARKED_MAX:
                self._parked[key] = begun
            else:
                self.counts.refused += 1
            return False
        sequence = Active(
            self._workers.row(worker),
            begun.prompt,
            begun.blocks,
            begun.prefill_tokens,
            begun.prefill_s,
        )
        taken = self._active.begin(key, sequence)
        self.counts.refused += not taken
        return taken

    def _send_state(self) -> None:
        self.flush()  # so that the state is what came after it
        self.counts.states_sent += 1
        sequences = list(self._own.values())
        parts = max(-(-len(sequences) // STATE_SEQUENCES), 1)
        for part in range(parts):
            some = sequences[part * STATE_SEQUENCES : (part + 1) * STATE_SEQUENCES]
            self._publish(State(self._name, self._epoch, self._next, part, parts, some))


def _changed(begun: Begun, change: Change) -> Begun:
    """The sequence as it would begin now."""
    match change:
        case Prefilled():
            return msgspec.structs.replace(begun, prefill_tokens=0.0, prefill_s=0.0)
        case Grew(_, blocks):
            return msgspec.structs.replace(begun, blocks=begun.blocks + blocks)
        case _:
            return begun
