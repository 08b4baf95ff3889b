"""The ledger against a dictionary: what is held, what is told of it, what is forgotten."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import ledger as ledger_module
from runtime.hashing import sequence_hashes
from runtime.ledger import Keys, Ledger, Run
from runtime.ledger_kernels import NOTE_WORDS

SLACK = 4
KEYS = 40
RUN_MAX = 6

Place = tuple[int, int | None, tuple[int, ...]]  # domain, parent, tokens


def keys_of(numbers: list[int]) -> Keys:
    """Some of them share a home in a small table."""
    return np.array([[n // 2, n % 2] for n in numbers], np.uint64).reshape(-1, 2)


def place_of(number: int) -> Place:
    """Chunks 8k to 8k + 7 follow each other; of two domains, 1, 2 or 3 blocks each."""
    sequence, index = divmod(number, 8)
    size = 1 + sequence % 3
    tokens = [1 + 1000 * sequence + n for n in range(8 * size)]
    chain = sequence_hashes(np.array(tokens, np.uint64)).tolist()
    parent = None if index == 0 else chain[index * size - 1]
    return 70 + sequence % 2, parent, tuple(tokens[index * size : (index + 1) * size])


def blocks_of(runs: list[Run]) -> list[tuple[int, int | None, int, int]]:
    """Each block's domain, parent, tokens' hash and name."""
    found = []
    for run in runs:
        parent = run.parent
        for name, tokens in zip(run.names.tolist(), run.tokens.tolist(), strict=True):
            found.append((run.domain, parent, tokens, name))
            parent = name
    return found


def expected(number: int) -> list[tuple[int, int | None, int, int]]:
    domain, parent, tokens = place_of(number)
    found = []
    for token in tokens:
        name = token
        if parent is not None:
            name = int(sequence_hashes(np.array([parent, token], np.uint64))[1])
        found.append((domain, parent, token, name))
        parent = name
    return found


def learn(ledger: Ledger, numbers: list[int]) -> list[int]:
    late = []
    for size in (1, 2, 3):
        those = [n for n in numbers if len(place_of(n)[2]) == size]
        notes = np.zeros((len(those), NOTE_WORDS + size), np.uint64)
        domains = np.zeros(len(those), np.uint32)
        for row, number in enumerate(those):
            domain, parent, tokens = place_of(number)
            notes[row, 0] = 1 | (parent is not None) << 8 | size << 16
            notes[row, 2] = parent or 0
            notes[row, 3:] = tokens
            known = ledger.number_of(domain)
            assert known is not None
            domains[row] = known
        if those:
            late += [those[at] for at in ledger.learn(keys_of(those), notes, domains).tolist()]
    return late


some = st.lists(st.integers(0, KEYS - 1), max_size=12, unique=True)
step = st.one_of(
    st.tuples(st.just("learn"), st.just(0), some),
    st.tuples(st.just("mark"), st.integers(0, 2), some),
    st.tuples(st.just("clear"), st.integers(0, 2), some),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(step, max_size=40))
def test_it_says_what_a_dictionary_says(steps: list[tuple[str, int, list[int]]]) -> None:
    ledger = Ledger(slack=SLACK, run_blocks_max=RUN_MAX)
    held: dict[int, set[int]] = {n: set() for n in range(KEYS)}
    for what, bit, numbers in steps:
        rows = ledger.rows_of(keys_of(numbers))
        known = [row >= 0 and ledger.note(row) is not None for row in rows.tolist()]
        named = dict(zip(numbers, known, strict=True))
        if what == "learn":
            late = learn(ledger, numbers)
            ledger.trim()
            assert sorted(late) == sorted(n for n in numbers if held[n] and not named[n])
        elif what == "mark":
            told = ledger.stored(ledger.mark(bit, keys_of(numbers)))
            fresh = [n for n in numbers if named[n] and bit not in held[n]]
            assert blocks_of(told) == [block for n in fresh for block in expected(n)]
            for number in numbers:
                held[number].add(bit)
        else:
            runs = ledger.removed(ledger.clear(bit, keys_of(numbers)))
            ledger.trim()
            gone = [n for n in numbers if named[n] and bit in held[n]]
            names = [name for run in runs for name in run.names.tolist()]
            assert names == [block[3] for n in gone for block in expected(n)]
            for number in numbers:
                held[number].discard(bit)
        ledger.check_integrity()
        _compare(ledger, held)


def _compare(ledger: Ledger, held: dict[int, set[int]]) -> None:
    everything = list(held)
    rows = dict(zip(everything, ledger.rows_of(keys_of(everything)).tolist(), strict=True))
    assert all(rows[n] >= 0 for n in everything if held[n])
    assert sum(row >= 0 and not held[n] for n, row in rows.items()) <= SLACK
    noted = {n: ledger.note(row) for n, row in rows.items() if row >= 0}
    found: set[tuple[int, ...]] = set()
    for groups in ledger.groups(3, blocks=5):
        for group in groups:
            pairs = zip(group.parents.tolist(), group.tokens.tolist(), strict=True)
            blocks = [(group.domain, group.bit, parent, token) for parent, token in pairs]
            assert found.isdisjoint(blocks)
            found |= set(blocks)
    wanted = {
        (domain, bit, parent or 0, token)
        for n in everything
        if noted.get(n) is not None
        for bit in held[n]
        for domain, parent, token, _ in expected(n)
    }
    assert found == wanted
    for bit in range(3):
        assert ledger.blocks(bit) == sum(block[1] == bit for block in wanted)
    for number, note in noted.items():
        if note is not None:
            domain, parent, tokens = note
            assert (domain, parent, tuple(tokens.tolist())) == place_of(number)


def test_it_grows_and_uses_again_what_was_given_back() -> None:
    ledger = Ledger(slack=0, run_blocks_max=1 << 20)
    numbers = np.arange(40_000, dtype=np.uint64)
    keys = np.stack([numbers * np.uint64(0x10000), numbers], axis=1)
    notes = np.ones((len(keys), NOTE_WORDS + 2), np.uint64)
    notes[:, 0] = 1 | 2 << 16
    known = ledger.number_of(5)
    assert known is not None
    domains = np.full(len(keys), known, np.uint32)
    taken = 0
    for _ in range(3):
        for at in range(0, len(keys), ledger_module.KEYS_AT_ONCE_MAX):
            part = slice(at, at + ledger_module.KEYS_AT_ONCE_MAX)
            assert not len(ledger.mark(1, keys[part]))
            assert len(ledger.learn(keys[part], notes[part], domains[part])) == len(keys[part])
        assert ledger.blocks(1) == 2 * len(keys)
        ledger.check_integrity()
        assert taken in {0, ledger.used_bytes}
        taken = ledger.used_bytes
        assert taken <= (48 + 4 * 65536 / 40_000 + 16) * len(keys)
        for at in range(0, len(keys), ledger_module.KEYS_AT_ONCE_MAX):
            ledger.clear(1, keys[at : at + ledger_module.KEYS_AT_ONCE_MAX])
            ledger.trim()
        assert len(ledger) == 0
        assert not next(ledger.groups(3, 100))


def test_runs_end_at_a_bound_and_where_blocks_do_not_follow() -> None:
    ledger = Ledger(slack=100, run_blocks_max=RUN_MAX)
    learn(ledger, [*range(8), *range(24, 32)])
    rows = ledger.mark(0, keys_of([0, 1, 2, 4, 5, 24]))
    assert [len(run.names) for run in ledger.stored(rows)] == [3, 2, 1]
    assert [len(run.names) for run in ledger.removed(rows)] == [5, 1]
    rows = ledger.mark(1, keys_of(list(range(8))))
    assert [len(run.names) for run in ledger.stored(rows)] == [6, 2]
