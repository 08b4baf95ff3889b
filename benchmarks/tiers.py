"""All benchmarks of the tiers, one after the other, each in a process of its own.

Prints a table for people (Markdown with `--markdown`, as in docs/BENCHMARKS.md) to standard error
and one JSON line with every row to standard output. A part that fails is named and ends the run
with status 1, after the others; a missed target does not.

    python -m benchmarks.tiers [--rounds N] [--engines] [--markdown] [PART ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from kvbm.cli.figures import Row, markdown, tell

PARTS = ("engine_copies", "ssd", "objects", "match", "peer_lmcache")
WITH_ENGINES = ("engine_overhead",)  # two real engines: a quarter of an hour
ROUNDED = frozenset({"engine_copies", "ssd", "objects", "peer_lmcache"})
PART_TIMEOUT_S = 3600.0


def run_part(part: str, rounds: int | None) -> list[Row] | None:
    """The rows of one benchmark; None if it failed, which its own output then explains."""
    command = [sys.executable, "-m", f"benchmarks.{part}"]
    if rounds is not None and part in ROUNDED:
        command += ["--rounds", str(rounds)]
    print(f"{part} ...", file=sys.stderr, flush=True)
    try:
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=PART_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{part} did not end within {PART_TIMEOUT_S:.0f} s", file=sys.stderr)
        return None
    if ended.returncode != 0:
        print(f"{part} ended with status {ended.returncode}", file=sys.stderr)
        return None
    rows: list[Row] = json.loads(ended.stdout.splitlines()[-1])["results"]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, help="of each part, instead of its own number")
    parser.add_argument("--engines", action="store_true", help="also those that start engines")
    parser.add_argument("--markdown", action="store_true", help="the table as in the docs")
    arguments = parser.parse_args()
    parts = tuple(arguments.parts) or PARTS
    if arguments.engines:
        parts += WITH_ENGINES
    unknown = sorted(set(parts) - {*PARTS, *WITH_ENGINES})
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found = {part: run_part(part, arguments.rounds) for part in parts}
    rows = [row for of_part in found.values() if of_part is not None for row in of_part]
    if arguments.markdown:
        print(markdown(rows), file=sys.stderr)
    tell("tiers", rows, table=not arguments.markdown)
    failed = [part for part, of_part in found.items() if of_part is None]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
