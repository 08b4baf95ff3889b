"""What `kvbm doctor` finds: one verdict for each check, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    says: str
    do: str = ""  # empty if all is well


@dataclass(frozen=True, slots=True)
class Place:
    """Where the daemon meets the machine: what it says itself, or what its settings say."""

    is_running: bool
    socket: Path
    pid: int | None
    uid: int
    host_memory_bytes: int
    huge_pages: bool
    ssd_path: Path | None
    ssd_bytes: int
    ssd_mover: str | None  # as set
    movers: dict[str, str]  # tier -> what moves its bytes now


def ok(check: str, says: str) -> Finding:
    return Finding(check, Verdict.OK, says)


def warning(check: str, says: str, do: str) -> Finding:
    return Finding(check, Verdict.WARNING, says, do)


def problem(check: str, says: str, do: str) -> Finding:
    return Finding(check, Verdict.PROBLEM, says, do)
