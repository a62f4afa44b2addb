"""What a run of the suite comes to: the parts in a table; of several runs, every part's time and its failures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .part import Part

_KINDS = ("passed", "failed", "errors", "skipped")


def summarize(parts: Sequence[Part], elapsed_seconds: float) -> None:
    """The parts of one run. CPU seconds tell more than seconds where the machine has other work."""
    table = Table("part", *_KINDS, "seconds", "CPU s", "", title="all parts")
    for part in parts:
        counts = [str(part.counts.get(kind, "")) for kind in _KINDS]
        table.add_row(part.name, *counts, f"{part.seconds:.1f}", f"{part.cpu_seconds:.1f}", _ending(part))
    _print(table)
    totals = {kind: sum(part.counts.get(kind, 0) for part in parts) for kind in _KINDS}
    bad = [part for part in parts if not part.good]
    for part in bad:
        print("\n    ".join([f"not ok: {part.name}", *part.failures]))
    counted = ", ".join(f"{count} {kind}" for kind, count in totals.items() if count) or "no tests ran"
    print(f"{counted} in {elapsed_seconds:.2f}s, {len(parts) - len(bad)} of {len(parts)} parts ok", flush=True)


def summarize_runs(runs: Sequence[Sequence[Part]], seconds: Sequence[float]) -> None:
    """The seconds of every part in every run, in red and with its ending where it failed; then how many runs did."""
    table = Table("part, seconds", *[f"run {number}" for number in range(1, len(runs) + 1)], "failed")
    for of_runs in zip(*runs):
        cells = [
            f"{part.seconds:.0f}" if part.good else f"[red]{part.seconds:.0f} {part.ending}[/]" for part in of_runs
        ]
        table.add_row(of_runs[0].name, *cells, str(sum(not part.good for part in of_runs)))
    _print(table)
    for number, parts in enumerate(runs, 1):
        for part in parts:
            if not part.good:
                print("\n    ".join([f"run {number}: {part.name}: {part.ending}", *part.failures]))
    good = sum(all(part.good for part in parts) for parts in runs)
    print(f"{good} of {len(runs)} runs passed; the longest took {max(seconds):.0f} s", flush=True)


def _ending(part: Part) -> str:
    return f"[{'green' if part.good else 'red'}]{part.ending}[/]"


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 120).print(table)
