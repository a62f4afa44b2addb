"""How the network benchmark's rows are shown: a table of one job, a plot of all, and what machine they are from."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def machine(ranks: int) -> str:
    """Cores, processor and load, which step times depend on."""
    cores = os.cpu_count() or 1
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    text = (
        f"{cores} cores, {found[1] if found else 'unknown processor'}, load {os.getloadavg()[0]:.1f}; a thread a rank"
    )
    return text + (f"; {ranks} ranks share the cores, and so do the steps of `bound`" if ranks > cores else "")


def title_of(row: Row) -> str:
    rate = "loopback" if row["rate_mbit"] is None else f"{row['rate_mbit']:g} Mbit/s"
    ranks = row.get("ranks_per_host", 1)
    return f"{row['hosts']} hosts{f' of {ranks} ranks' * (ranks > 1)}, {rate}, {row['parameters']} parameters"


def table_of(rows: Sequence[Row]) -> Table:
    """Of one job, fastest first."""
    table = Table(title=title_of(rows[0]))
    bound = next((row["step_seconds"] for row in rows if row["method"] == "bound"), None)
    table.add_column("method")
    for head in ("step, ms", "exposed, ms", "x bound", "fastest, ms", "MB a rank and step", "rounds x steps"):
        table.add_column(head, justify="right")
    for row in sorted(rows, key=lambda row: row["step_seconds"]):
        mine, exposed = row["step_seconds"], row["exposed_seconds"]
        against = ["-", "-"] if bound is None else [f"{1e3 * exposed:.1f}", f"{mine / bound:.2f}"]
        sent = f"{row['bytes_per_rank_per_step'] / 1e6:.3f}"
        repeats = f"{row['rounds']} x {row['steps_per_round']}"
        table.add_row(
            row["method"], f"{1e3 * mine:.1f}", *against, f"{1e3 * row['fastest_seconds']:.1f}", sent, repeats
        )
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Step times as bars, a panel for each job; the line is the step without communication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(map(title_of, rows)))
    columns = min(len(titles), 3)
    lines = -(-len(titles) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.5 * lines), squeeze=False)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes.flat, titles):
        mine = [row for row in rows if title_of(row) == title]
        bars = axis.barh([row["method"] for row in mine], [1e3 * row["step_seconds"] for row in mine])
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
        for row in mine:
            if row["method"] == "bound":
                axis.axvline(1e3 * row["step_seconds"], color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("ms a step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
