"""`kvbm what-if` as an operator uses it, against a real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbm.cli.client import AdminClient
from kvbm.stand_in import StandIn
from storage_tiers.testing import make_items
from tests.kvbm.conftest import Kvbm
from tests.kvbm.test_cli import CHUNK, WAIT_S, keys_of, running_daemon
from tests.waiting import wait_until


def test_what_if_tells_what_a_larger_tier_would_find(
    tmp_path: Path, kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains asked for in turn that host memory has no room for all of."""
    monkeypatch.setenv("KVBM_WHAT_IF__RATE", "1")  # of so few keys all, for exact figures
    with running_daemon(tmp_path) as daemon:
        daemon.start()
        refused = kvbm("what-if", "--add", "1MiB", "--url", daemon.url)
        assert refused.status == 1 and "nothing" not in refused.out
        assert "no engine has asked for anything yet" in refused.err
        with StandIn(daemon.socket, CHUNK) as engine:
            chains = [make_items(f"turn-{number}", 200, CHUNK) for number in range(6)]
            for items in chains * 2:
                engine.fetch(keys_of(items))
                engine.store(items)
            asked = 2 * len(chains) * 200

            def watched() -> bool:
                with AdminClient(daemon.url, None) as client:
                    sample = client.get("/v1/curve")["sample"]
                return bool(sample["asked_chunks_total"] == asked)

            wait_until(watched, WAIT_S, "every lookup is counted")
        told = kvbm("what-if", "--add", "64MiB", "--json", "--url", daemon.url).json()
        assert told["answer"]["tier"] == "G2" and told["sample"]["rate"] == 1
        assert told["answer"]["then_bytes"] == told["answer"]["now_bytes"] + (64 << 20)
        # All 75 MiB of it are in G3 by LRU, and half of the lookups are the first ones.
        assert told["answer"]["hit_then"]["value"] == pytest.approx(0.5)
        shown = kvbm("what-if", "--size", "100MiB", "--url", daemon.url)
        assert shown.status == 0 and "found in any tier: " in shown.out and "G3" in shown.out
        for wrong in (["--add", "9TiB"], ["--tier", "G4", "--add", "1GiB"], ["--add", "many"]):
            assert kvbm("what-if", *wrong, "--url", daemon.url).status == 1
        assert kvbm("what-if", "--url", daemon.url).status == 2
