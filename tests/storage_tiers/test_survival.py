"""What is learnt of reuse: which class comes back and when, and what that is worth."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.policy import fingerprint
from storage_tiers.survival import (
    AGES,
    CLASSES,
    PROBES_MIN,
    RESIDENTS_PER_PROBE,
    Survival,
    class_of,
    gittins,
    reuse_chances,
    shared_class,
    turn_of,
)


def test_survival_learns_which_class_comes_back_and_when() -> None:
    survival = Survival()
    returns, leaves = class_of(3, 1, 30, 0), class_of(1, 40, -1, 0)
    for number in range(20_000):
        key = fingerprint(number)
        survival.probe(key, number, returns if number % 2 else leaves)
        if number % 2 and number > 60:
            survival.seen(fingerprint(number - 60), number)
    worth = np.array(survival.worth).reshape(-1, AGES)
    assert worth[returns, 0] > 3 * worth[leaves, 0]
    assert worth[returns].argmax() > 4, "it is worth most shortly before it is due"


def test_probes_are_few_however_many_residents() -> None:
    survival = Survival()
    for residents in range(0, 64 * PROBES_MIN, 4096):
        survival.fit_to(residents)
        assert len(survival) <= max(PROBES_MIN, residents // RESIDENTS_PER_PROBE)
    assert len(survival) > PROBES_MIN


def test_a_combination_never_seen_takes_from_each_feature_what_others_show() -> None:
    """Late turns come back twice as often, small ones three times: small late ones six times."""
    used, at_risk = np.zeros((CLASSES, AGES)), np.zeros((CLASSES, AGES))
    for turn, fresh, chance in ((1, 30, 0.01), (3, 30, 0.02), (1, 1, 0.03)):
        at_risk[class_of(turn, fresh, -1, 0), :20] = 100_000
        used[class_of(turn, fresh, -1, 0), :20] = 100_000 * chance
    reuse = reuse_chances(used, at_risk)
    assert reuse[class_of(3, 1, -1, 0), 5] == pytest.approx(0.06, rel=0.2)
    assert reuse[class_of(1, 1, -1, 0), 5] == pytest.approx(0.03, rel=0.1)


def test_before_anything_is_known_the_order_is_that_of_lru() -> None:
    worth = np.array(Survival().worth).reshape(CLASSES, AGES)
    assert np.allclose(worth, worth[0])
    assert (np.diff(worth[0, : AGES - 8]) < 0).all()


def test_each_class_is_its_own() -> None:
    paths = {
        class_of(turn, fresh, gap_s, tail)
        for turn in range(1, 9)
        for fresh in range(300)
        for gap_s in (-1, 0, 5, 9, 70, 600, 5000)
        for tail in (0, 1)
    }
    shared = {shared_class(uses) for uses in range(2, 256)}
    assert paths | shared == set(range(CLASSES)) and not paths & shared
    assert turn_of(class_of(4, 0, -1, 1)) == 4
    assert turn_of(shared_class(9)) == 0


def test_giving_up_late_pays_only_where_reuse_is_late() -> None:
    """By hand: a class that is reused in its third interval for certain, and one never."""
    reuse = np.zeros((2, AGES))
    reuse[0, 2] = 1.0
    rate = gittins(reuse)
    edges = np.exp2(np.arange(AGES + 1) / 2)
    widths = np.diff(edges)
    assert rate[0, 0] == pytest.approx(1 / (widths[0] + widths[1] + widths[2] / 2), rel=1e-5)
    assert rate[0, 2] == pytest.approx(1 / (widths[2] / 2), rel=1e-5)
    assert not rate[1].any()
