"""`kvbm status`, `kvbm tiers`, `kvbm peers`: the node at a glance, its tiers, its peers."""

from __future__ import annotations

import time
from pathlib import Path

import typer
from rich.table import Table

from kvbm.cli.client import AdminClient, Failure, Json
from kvbm.cli.instances import heading, instances_table, look
from kvbm.cli.options import DEFAULT_URL, AsJson, Config, Token, Url
from kvbm.cli.output import age, console, print_json, share, size, table

NOT_READY = 3


def status(
    url: Url = DEFAULT_URL,
    token: Token = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Is the node ready, what does it hold, who is connected? Exit status 3 if it is not ready.

    Instances are those of discovery as the settings here have it: --config and KVBM_DISCOVERY__*.
    """
    with AdminClient(url, token) as client:
        checks = client.readiness()
        node = client.get("/v1/node")
        found = client.get("/v1/tiers")
        sessions = client.get("/v1/sessions")["sessions"]
        stream = client.get("/v1/stream")["stream"]
    registered = _registered(config)
    ready = all(reason == "ok" for reason in checks.values())
    if as_json:
        told = {"ready": ready, "checks": checks, **node, **found, "sessions": sessions}
        print_json({**told, "stream": stream, "discovery": registered})
    else:
        _show(ready, checks, node, found, sessions)
        if stream is not None:
            _show_stream(stream)
        _show_instances(registered)
    if not ready:
        raise typer.Exit(NOT_READY)


def tiers(url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """What each tier holds and has done, and what waits between them."""
    with AdminClient(url, token) as client:
        found = client.get("/v1/tiers")
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(tiers_table(found["tiers"]))
    out.print()
    out.print(_damage_table(found["tiers"]))
    out.print()
    out.print(queues_table(found["queues"]))


def peers(url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Other nodes whose host memory may be read, and those that read this one's."""
    with AdminClient(url, token) as client:
        found = client.get("/v1/peers")
    if as_json:
        print_json(found)
        return
    shown = table("peer", "node", "found by", "state", ">chunks", ">read from it")
    for peer in found["peers"]:
        state = f"read by {peer['mover']}" if peer["connected"] else peer["problem"]
        counts = (str(peer["chunks"]), str(peer["loaded_chunks"]))
        shown.add_row(peer["address"], peer["node"] or "-", peer["found_by"], state, *counts)
    out = console()
    out.print(shown)
    readers = ", ".join(found["readers"]) or "nobody"
    out.print(f"read from here by {readers}; {size(found['lent_bytes'])} held for them")


def tiers_table(found: list[Json]) -> Table:
    """Use, hits and speed of each tier."""
    shown = table(
        *("tier", "moved by", ">used", ">of", ">full", ">chunks", ">hits", ">hit rate"),
        *(">in/s", ">out/s", ">in/s (1 min)", ">out/s (1 min)"),
    )
    for tier in found:
        rates = [
            size(rate[way])
            for rate in tier["rates"]
            for way in ("in_bytes_per_s", "out_bytes_per_s")
        ]
        used, capacity = tier["used_bytes"], tier["capacity_bytes"]
        shown.add_row(
            *(tier["tier"], tier["mover"], size(used), size(capacity), share(used, capacity)),
            *(str(tier["chunks"]), str(tier["hits"])),
            share(tier["hits"], tier["hits"] + tier["misses"]),
            *rates,
        )
    return shown


def queues_table(queues: list[Json]) -> Table:
    shown = table("queue", ">waiting", ">limit")
    for queue in queues:
        shown.add_row(queue["name"], str(queue["depth"]), str(queue["limit"]))
    return shown


def _damage_table(found: list[Json]) -> Table:
    shown = table("tier", ">written", ">read", "evicted", ">corrupt", "errors")
    for tier in found:
        shown.add_row(
            *(tier["tier"], size(tier["stored_bytes"]), size(tier["loaded_bytes"])),
            _counts(tier["evictions"]),
            str(tier["corrupt"]),
            _counts(tier["errors"]),
        )
    return shown


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "-"


def _show(
    ready: bool, checks: dict[str, str], node: Json, found: Json, sessions: list[Json]
) -> None:
    out = console()
    process = node["process"]
    state = "[green]ready[/]" if ready else "[red]not ready[/]"
    up = age(time.time() - process["started"])
    out.print(f"[bold]{node['node']}[/]  {node['name']} {node['version']}, {state}, up {up}")
    for name, reason in checks.items():
        if reason != "ok":
            out.print(f"  [red]{name}[/]: {reason}", soft_wrap=True)
    if node["drain"]["draining"]:
        drain = node["drain"]
        out.print(
            f"  draining: {drain['left_chunks']} chunks to write, engines hold "
            f"{size(drain['leased_bytes'])} of slots"
        )
    out.print(f"  {_handover_line(node['handover'])}", soft_wrap=True)
    out.print()
    out.print(tiers_table(found["tiers"]))
    out.print()
    engines = {session["engine"] for session in sessions}
    claims = sum(session["claims"] for session in sessions)
    leased = sum(session["leased_bytes"] for session in sessions)
    waiting = sum(queue["depth"] for queue in found["queues"])
    workers = sorted({s["worker_id"] for s in sessions if s["worker_id"] is not None})
    known = f" (worker {', '.join(f'0x{one}' for one in workers)})" if workers else ""
    out.print(
        f"{len(engines)} engines in {len(sessions)} connections{known}; {claims} chunks claimed, "
        f"{size(leased)} of slots lent; {waiting} chunks wait in queues"
    )


def _registered(config: Path | None) -> Json:
    """What discovery has; if that cannot be told, `error` says why and `instances` is null."""
    try:
        return {**look(config, []), "error": None}
    except Failure as failure:
        return {"discovery": None, "namespace": None, "instances": None, "error": str(failure)}


def _show_instances(registered: Json) -> None:
    out = console()
    if registered["error"] is not None:
        out.print(f"[red]instances[/]: {registered['error']}", soft_wrap=True)
        return
    out.print(heading(registered))
    if registered["instances"]:
        out.print()
        out.print(instances_table(registered["instances"]))


def _show_stream(found: Json) -> None:
    """What routers are told, in a line, and one for each engine that is heard."""
    out = console()
    stream, tiers = found["stream"], found["tiers"]
    blocks = ", ".join(f"{tier} {count}" for tier, count in tiers["blocks"].items())
    out.print(
        f"routers: event {stream['next_sequence']} of publisher {stream['publisher']}; "
        f"{blocks} blocks; {tiers['unannounced_chunks']} chunks without a note; "
        f"{size(stream['ring_bytes'])} to replay",
        soft_wrap=True,
    )
    if found["endpoint"] is None:
        out.print(
            f"  [red]they cannot ask for what they missed[/]: {found['error']}", soft_wrap=True
        )
    for engine in found["engines"]:
        state = "heard" if engine["connected"] else f"not heard: {engine['error']}"
        out.print(
            f"  engine {engine['worker']} at {engine['endpoint']} {state}; "
            f"G1 {engine['blocks']} blocks, {engine['lost_total']} batches lost, "
            f"{engine['orphaned_total']} blocks without a place",
            soft_wrap=True,
        )


def _handover_line(handover: Json) -> str:
    """Whether host memory outlives a restart, and what it brought along from the last one."""
    if handover["reason"] is not None:
        said = f"host memory will not outlive a restart: {handover['reason']}"
    else:
        said = "host memory outlives a restart"
    if handover["adopted_chunks"] or handover["waiting_chunks"]:
        said += (
            f"; taken over {handover['adopted_chunks']} chunks, {size(handover['adopted_bytes'])}"
        )
    if handover["waiting_chunks"]:
        said += f", {handover['waiting_chunks']} to check"
    if handover["aside_bytes"]:
        said += f"; {size(handover['aside_bytes'])} kept aside"
    return said
