"""`kvbm doctor`: is this node as it should be, and if not, what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import typer

from kvbm.cli.client import AdminClient, Failure, Json, Refused
from kvbm.cli.environment import check_environment
from kvbm.cli.findings import Finding, Place, Verdict, ok, problem, warning
from kvbm.cli.machine import check_machine
from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url
from kvbm.cli.output import console, print_json
from runtime.hosts import is_loopback

_STYLES: Final = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red"}
_LOG: Final = "its log says more (journalctl -u kvbm-daemon)"
_REMEDIES: Final = {
    "G3": f"make ssd.path usable; {_LOG}",
    "G4": f"check s3.endpoint_url, s3.bucket and credentials; the daemon goes on trying; {_LOG}",
    "socket": f"wait, or see what the daemon waits for: {_LOG}",
    "stores": "kvbm resume, when the node may be used again",
}


def doctor(
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The daemon's settings, for when it does not run."),
    ] = None,
) -> None:
    """Check the daemon, this machine and this environment. Exit status 1 if there is a problem."""
    out = console()
    found: list[Finding] = []
    for finding in _findings(url, token, config):
        found.append(finding)
        if not as_json:
            style = _STYLES[finding.verdict]
            out.print(f"[{style}]{finding.verdict:8}[/] {finding.check:13}", end="")
            out.print(finding.says, markup=False, soft_wrap=True)
            if finding.do:
                out.print(f"{'':23}-> {finding.do}", markup=False, soft_wrap=True)
    is_well = all(finding.verdict is not Verdict.PROBLEM for finding in found)
    if as_json:
        print_json({"ok": is_well, "checks": [asdict(finding) for finding in found]})
    if not is_well:
        raise typer.Exit(1)


def _findings(url: str, token: str | None, config: Path | None) -> Iterator[Finding]:
    configured: Place | None = None
    if config is not None:
        from kvbm.cli.configured import check_settings

        finding, configured = check_settings(config)
        yield finding
    place: Place | None = None
    with AdminClient(url, token) as client:
        try:
            checks = client.readiness()
            node, tiers = client.get("/v1/node"), client.get("/v1/tiers")["tiers"]
            peers = client.get("/v1/peers")["peers"]
        except Refused as refused:
            yield problem("daemon", f"{url} answers: {refused}", "give --token or KVBM_ADMIN_TOKEN")
        except Failure as failure:
            yield problem("daemon", str(failure), "systemctl start kvbm-daemon")
        else:
            yield ok(
                "daemon", f"{node['name']} {node['version']} on {node['node']} answers at {url}"
            )
            yield from _daemon_findings(checks, node)
            yield from _peer_findings(peers)
            place = _place_of(node, tiers)
    is_here = is_loopback(urlsplit(url).hostname or "")
    place = place or configured
    if place is not None and is_here:
        yield from check_machine(place)
    elif place is not None:
        yield warning(
            "machine",
            "the daemon is on another machine; its socket, disk and memory were not looked at",
            "run kvbm doctor there",
        )
    yield from check_environment(place)


def _daemon_findings(checks: dict[str, str], node: Json) -> Iterator[Finding]:
    for name, reason in checks.items():
        check = f"ready {name}"
        if reason == "ok":
            yield ok(check, "S3 can be reached" if name == "G4" else "ready")
        elif name == "stores":
            yield warning(check, reason, _REMEDIES[name])
        else:
            yield problem(check, reason, _REMEDIES.get(name, _LOG))
    yield _handover_finding(node["handover"])
    process = node["process"]
    plane, error = process["events_plane"], process["events_error"]
    if plane == "zmq" and error is None:
        yield ok("events", "block events are published over ZMQ, and all peers are connected")
    elif plane == "zmq":
        remedy = "mend events.zmq_bind or events.zmq_peers, or start the peer"
        yield warning("events", f"the event plane over ZMQ: {error}", remedy)
    elif plane != "nats":
        yield ok("events", f"no block events are published (events.plane: {plane})")
    elif error is None:
        yield ok("events", f"connected to NATS at {process['events_url']}")
    else:
        yield problem(
            "events",
            f"the event plane over NATS at {process['events_url']}: {error}",
            "start NATS, or mend events.nats_url, its credentials, its TLS files or JetStream; "
            "nothing else waits for it",
        )


def _handover_finding(handover: Json) -> Finding:
    if handover["reason"] is not None:
        return warning(
            "handover",
            f"host memory will start empty after a restart: {handover['reason']}",
            "run it by the unit of `kvbm-daemon print-unit`, or by `kvbm-daemon hold`",
        )
    says = f"host memory outlives a restart; {handover['adopted_chunks']} chunks taken over"
    if handover["dropped"]:
        lost = ", ".join(f"{count} {reason}" for reason, count in handover["dropped"].items())
        says += f", not taken over: {lost}"
    return ok("handover", says)


def _peer_findings(peers: list[Json]) -> Iterator[Finding]:
    for peer in peers:
        who = f"{peer['node'] or 'the node'} at {peer['address']}"
        if peer["connected"]:
            yield ok("peer", f"{who} has {peer['chunks']} chunks, read by {peer['mover']}")
        elif not peer["redundant"]:
            yield warning(
                "peer",
                f"{who} cannot be read: {peer['problem']}",
                "start its daemon, or mend peers.nodes, peers.token, or the network between",
            )


def _place_of(node: Json, tiers: list[Json]) -> Place:
    process = node["process"]
    return Place(
        is_running=True,
        socket=Path(process["socket"]),
        pid=process["pid"],
        uid=process["uid"],
        host_memory_bytes=process["host_memory_bytes"],
        huge_pages=process["huge_pages"],
        ssd_path=Path(process["ssd_path"]) if process["ssd_path"] else None,
        ssd_bytes=sum(tier["capacity_bytes"] for tier in tiers if tier["tier"] == "G3"),
        ssd_mover=process["ssd_mover"],
        movers={tier["tier"]: tier["mover"] for tier in tiers},
    )
