"""Ten thousand steps of two ranks under mpi4py: replicas stay equal to the bit, and memory stays what it was.

Ends with exit code 1 where one of them does not. STEPS=10000, METHODS, CHECKS=20, OUT=rows.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jobs
from rich.console import Console
from rich.table import Table

from report import write_rows

METHODS = ("adacomp", "topk", "terngrad", "powersgd")  # steps are shared out among them
RANKS = 2
GROWTH_BYTES = 4 << 20  # from the first quarter on; a leak of 1 KB a step would be 7 MB in 7,500 steps


def launcher(program: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """mpirun with `python -m mpi4py`, so that an exception on one rank ends the other."""
    command = jobs.on_this_machine(RANKS)(program, environment)
    place = command.index(sys.executable) + 1
    return [*command[:place], "-m", "mpi4py", *command[place:]]


def growth(rows: Sequence[Mapping[str, Any]]) -> int:
    """Bytes from the first quarter of a method's checks to its last."""
    return int(rows[-1]["resident_bytes"] - rows[len(rows) // 4]["resident_bytes"])


def main() -> int:
    jobs.prepare()
    steps, checks = int(os.environ.get("STEPS") or 10_000), int(os.environ.get("CHECKS") or 20)
    methods = [name for name in os.environ.get("METHODS", "").split(",") if name] or list(METHODS)
    worker = str(Path(__file__).with_name("soak_worker.py"))
    table = Table("method", *("steps", "equal at", "resident, MB", "growth, KB", "ms a step"), title=f"{RANKS} ranks")
    rows: list[dict[str, Any]] = []
    bad = []
    for method in methods:
        found = jobs.rows_of([worker, method, str(steps // len(methods)), str(checks)], launcher)
        rows += found
        equal, last = sum(row["equal"] for row in found), found[-1]
        if equal < len(found) or growth(found) > GROWTH_BYTES:
            bad.append(method)
        cells = f"{last['step']:,}", f"{equal} of {len(found)}", f"{last['resident_bytes'] / 1e6:.1f}"
        table.add_row(method, *cells, f"{growth(found) / 1e3:.0f}", f"{1e3 * last['seconds'] / last['step']:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{steps:,} steps: {'not well: ' + ', '.join(bad) if bad else 'replicas equal to the bit, memory flat'}")
    if os.environ.get("OUT"):
        write_rows(os.environ["OUT"], rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
