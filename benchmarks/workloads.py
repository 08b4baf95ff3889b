"""Request traces made up to judge policies by, of different character, each from a fixed seed.

What people do is lognormal or memoryless: thinking takes a minute at the median, tools seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Request = tuple[float, list[int]]  # seconds, blocks
Session = Iterator[tuple[float, list[int]]]  # pause in seconds before it, blocks


def synthetic() -> dict[str, list[Request]]:
    """Nine workloads of about an hour; block numbers are unique across sessions of one.

    The first five were there when the value policy was made, the last four were added to judge it.
    """
    return {
        "chats": _play(1, lambda r, new: _chat(r, new, []), 1.0),
        "system-prompts": _shared_prompts(2),
        "chats+scans": _play(
            3, lambda r, new: _chat(r, new, []) if r.random() < 0.5 else _scan(r, new), 1.5
        ),
        "agents": _play(4, _agent, 0.08),
        "batch-loop": _batch_loop(5),
        "documents": _documents(6),
        "few-shot": _few_shot(7),
        "mixed-day": _mixed_day(8),
        "tools": _play(9, _tools, 0.25),
    }


def _play(
    seed: int,
    session: Callable[[random.Random, Callable[[int], list[int]]], Session],
    arrivals_per_s: float,
    span_s: float = 2400.0,
) -> list[Request]:
    """Sessions that begin at random moments, merged by time."""
    dice = random.Random(seed)
    used = 0

    def new(count: int) -> list[int]:
        nonlocal used
        used += count
        return list(range(used - count, used))

    requests: list[Request] = []
    at_s = 0.0
    while (at_s := at_s + dice.expovariate(arrivals_per_s)) < span_s:
        now_s = at_s
        for pause_s, blocks in session(dice, new):
            now_s += pause_s
            requests.append((now_s, blocks))
    return sorted(requests, key=lambda request: request[0])


def _chat(dice: random.Random, new: Callable[[int], list[int]], start: list[int]) -> Session:
    """Each turn adds to all before it; two in three go on; people think for about a minute."""
    blocks = start + new(1 + int(dice.expovariate(1 / 8)))
    yield 0.0, list(blocks)
    while dice.random() < 0.65:
        blocks = blocks + new(1 + int(dice.expovariate(1 / 3)))
        yield dice.lognormvariate(4.0, 1.0), blocks


def _scan(dice: random.Random, new: Callable[[int], list[int]]) -> Session:
    """A long document that nobody asks about again."""
    yield 0.0, new(dice.randint(20, 80))


def _agent(dice: random.Random, new: Callable[[int], list[int]]) -> Session:
    """Steps seconds apart; one in ten goes back to an earlier step and branches."""
    path = [new(12)]
    for _ in range(dice.randint(5, 60)):
        if dice.random() < 0.1:
            path = path[: dice.randint(1, len(path))]
        path = [*path, new(dice.randint(1, 3))]
        yield dice.expovariate(1 / 15), [block for part in path for block in part]


def _shared_prompts(seed: int) -> list[Request]:
    """Prompts of 40 products, some far more popular than others, one or few questions each."""
    prompts = [[-(p * 64 + i + 1) for i in range(8 + p % 32)] for p in range(40)]
    weights = [1 / (rank + 1) for rank in range(len(prompts))]

    def session(dice: random.Random, new: Callable[[int], list[int]]) -> Session:
        return _chat(dice, new, dice.choices(prompts, weights)[0])

    return _play(seed, session, 1.0)


def _batch_loop(seed: int) -> list[Request]:
    """400 documents asked about in turn, again and again, between chats."""
    documents = [[-(d * 64 + i + 1) for i in range(12)] for d in range(400)]
    jobs = [(float(i), [*documents[i % 400], -100_000 - i]) for i in range(2400)]
    chats = _play(seed, lambda dice, new: _chat(dice, new, []), 0.5)
    return sorted([*jobs, *chats], key=lambda request: request[0])


def _documents(seed: int) -> list[Request]:
    """Questions about 1500 documents by Zipf's law; each third one leads to a short talk."""
    dice = random.Random(seed + 100)
    sizes = [4 + int(dice.expovariate(1 / 16)) for _ in range(1500)]
    weights = [1 / (rank + 1) ** 0.9 for rank in range(len(sizes))]
    documents = [[-(d * 256 + i + 1) for i in range(size)] for d, size in enumerate(sizes)]

    def session(dice: random.Random, new: Callable[[int], list[int]]) -> Session:
        blocks = dice.choices(documents, weights)[0] + new(1)
        yield 0.0, blocks
        while dice.random() < 0.33:
            blocks = blocks + new(2)
            yield dice.lognormvariate(3.5, 1.0), blocks

    return _play(seed, session, 1.5)


def _few_shot(seed: int) -> list[Request]:
    """Twelve evaluations of 400 items, 15 s apart in groups of 20, between chats.

    The items of one begin with the same 24 blocks; nobody needs them when it is over.
    """
    dice = random.Random(seed + 100)
    jobs = []
    for job in range(12):
        start_s = dice.uniform(0, 2100)
        shots = [-(job * 64 + i + 1) for i in range(24)]
        for item in range(400):
            own = [-(1_000_000 + (job * 400 + item) * 4 + i) for i in range(2)]
            jobs.append((start_s + item // 20 * 15.0 + dice.random(), shots + own))
    chats = _play(seed, lambda dice, new: _chat(dice, new, []), 0.7)
    return sorted([*jobs, *chats], key=lambda request: request[0])


def _mixed_day(seed: int) -> list[Request]:
    """Chats by day that give way to agents and scans, and back: each has a third of the time."""

    def chat(dice: random.Random, new: Callable[[int], list[int]]) -> Session:
        return _chat(dice, new, [])

    def night(dice: random.Random, new: Callable[[int], list[int]]) -> Session:
        return _agent(dice, new) if dice.random() < 0.3 else _scan(dice, new)

    requests: list[Request] = []
    for part, (session, arrivals_per_s) in enumerate(((chat, 1.5), (night, 0.3), (chat, 1.5))):
        for at_s, blocks in _play(seed + part, session, arrivals_per_s, 900.0):
            requests.append((at_s + part * 900.0, [block * 3 + part for block in blocks]))
    return sorted(requests, key=lambda request: request[0])


def _tools(dice: random.Random, new: Callable[[int], list[int]]) -> Session:
    """Twelve tool prompts; calls return within seconds, but now and then a person must answer."""
    tool = min(int(dice.expovariate(1 / 3)), 11)
    blocks = [-(tool * 64 + i + 1) for i in range(10)] + new(1 + int(dice.expovariate(1 / 2)))
    yield 0.0, list(blocks)
    while dice.random() < 0.85:
        blocks = blocks + new(1 + int(dice.expovariate(1 / 2)))
        person = dice.random() < 0.2
        yield dice.lognormvariate(4.5, 0.8) if person else dice.lognormvariate(1.5, 0.7), blocks
