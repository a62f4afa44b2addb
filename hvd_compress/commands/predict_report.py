"""What hvd-compress predict shows: a table, its assumptions, a recommendation; JSON; a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pictures import figure
from ..prediction import GAIN, PAYLOAD, PLAIN, RATES, Cluster, Compute, Row, plain_of
from ..prediction.work import Named

_PLOTTED_RANKS = (2, 4, 8, 16, 32, 64)  # times those of a node
_PLOTTED_METHODS = 6
_HEADS = ("MB in", "fewer", "encode ms", "decode ms", "exposed ms", "step ms", "speed-up", "pays below", "memory")


def assumptions(cluster: Cluster, compute: Compute, named: Named) -> list[str]:
    """Sentences."""
    numel = sum(tensor.numel() for _, tensor in named)
    return [
        f"{numel:,} parameters in {len(named)} tensors, {cluster.ranks} ranks on "
        f"{cluster.ranks // cluster.ranks_per_node} nodes",
        f"{_rate(cluster.bandwidth)} of payload each way at once into a node, that nobody else uses, "
        f"{100 * PAYLOAD:.0f} % of what its link is called; {1e6 * cluster.latency_seconds:.0f} us a message",
        f"sums go around a ring at {_rate(cluster.sum_bandwidth or cluster.bandwidth)}",
        f"a step of {1e3 * compute.seconds:.1f} ms without communication, in which gradients come evenly during "
        f"{1e3 * compute.backward_seconds:.1f} ms of backward",
        f"collectives start every {1e3 * cluster.cycle_seconds:.1f} ms, and follow one another",
        "encoding and decoding take the training thread as long as they did just now, here; the network takes no time "
        "of it",
    ]


def print_table(rows: Sequence[Row], best: Row, assumed: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    none = next(row for row in rows if row.method == "none")
    table = Table("method", "topology", title="a step, as predicted")
    for head in _HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.step.seconds):
        table.add_row(row.method, row.topology, *_cells(row, none), style="bold" if row is best else None)
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    console.print(table)
    console.print(
        "MB in: what a rank receives from other nodes in a step. speed-up: of no compression. pays below: the link "
        f"below which it is at least {100 * GAIN:.0f} % faster than none and fp16. memory: between steps, in copies of "
        "the model.\nAssumed:"
    )
    for sentence in assumed:
        console.print(f"- {sentence}")
    console.print(_advice(best, rows), style="bold")


def _cells(row: Row, none: Row) -> list[str]:
    work, step = row.work, row.step
    milliseconds = work.encode_seconds, work.decode_seconds, step.exposed_seconds, step.seconds
    return [
        f"{work.outside_bytes / 1e6:.3g}",
        f"{none.work.outside_bytes / work.outside_bytes:.3g} x",
        *(f"{1e3 * seconds:.1f}" for seconds in milliseconds),
        f"{none.step.seconds / step.seconds:.2f} x",
        _pays(row),
        f"{work.held_bytes / 4 / work.parameters:.2f}",
    ]


def _advice(best: Row, rows: Sequence[Row]) -> str:
    plain = plain_of(rows)
    if best.plain:
        return f"recommended: {best.method}. Nothing else is {100 * GAIN:.0f} % faster on this link."
    faster = plain.step.seconds / best.step.seconds
    adam = " With Adam it learns more slowly: see --adam." if best.slow_with_adam else ""
    return f"recommended: {best.name}, {faster:.2f} times as fast as {plain.method}. Accuracy: docs/accuracy.md.{adam}"


def _pays(row: Row) -> str:
    if row.plain:
        return "-"
    if row.pays_below is None:
        return "never"
    return "always" if math.isinf(row.pays_below) else _rate(row.pays_below / PAYLOAD)


def _rate(bytes_a_second: float) -> str:
    bits = 8 * bytes_a_second
    unit, factor = ("Gbit/s", 1e9) if bits >= 1e9 else ("Mbit/s", 1e6)
    return f"{bits / factor:.3g} {unit}"


def as_json(row: Row) -> dict[str, Any]:
    """Seconds, bytes, payload bytes a second; no link below which it pays is null, any link is "any"."""
    pays: float | str | None = row.pays_below
    return {
        "method": row.method,
        "topology": row.topology,
        "received_bytes": row.work.received_bytes,
        "received_from_other_nodes_bytes": row.work.outside_bytes,
        "encode_seconds": row.work.encode_seconds,
        "decode_seconds": row.work.decode_seconds,
        "step_seconds": row.step.seconds,
        "exposed_seconds": row.step.exposed_seconds,
        "link_seconds": row.step.link_seconds,
        "pays_below": "any" if pays == math.inf else pays,
        "held_bytes": row.work.held_bytes,
        "slow_with_adam": row.slow_with_adam,
    }


def check_picture(picture: Path) -> None:
    """Raise ImportError without matplotlib, ValueError for what cannot be written: before anything is measured."""
    known = figure().canvas.get_supported_filetypes()
    if picture.suffix[1:] not in known:
        raise ValueError(f"{picture}: a picture's name ends in one of .{', .'.join(sorted(known))}")
    if not picture.resolve().parent.is_dir():
        raise ValueError(f"{picture}: there is no such folder")


def plot(picture: Path, rows: Sequence[Row], named: Named, cluster: Cluster, compute: Compute) -> None:
    """Step time by link and by ranks: Horovod's own methods, and the fastest others, each on its best topology."""
    drawn = figure(figsize=(11, 5.5))
    by_link, by_ranks = drawn.subplots(1, 2)
    rates = RATES[(RATES > 1e6) & (RATES < 2e10)]
    counts = [number * cluster.ranks_per_node for number in _PLOTTED_RANKS]
    for method, ways in _shown(rows).items():
        line = "--" if ways[0].plain else "-"
        steps = [min(row.seconds_at(rate, cluster, compute) for row in ways) for rate in rates]
        by_link.plot(8 * rates / PAYLOAD / 1e9, [1e3 * seconds for seconds in steps], line)
        steps = [min(row.seconds_with(count, named, cluster, compute) for row in ways) for count in counts]
        by_ranks.plot(counts, [1e3 * seconds for seconds in steps], line, marker="o", label=method)
    for axes in (by_link, by_ranks):
        axes.axhline(1e3 * compute.seconds, color="grey", linestyle=":")
        axes.set(xscale="log", yscale="log", ylabel="step, ms")
        axes.grid(alpha=0.3)
    by_link.axvline(8 * cluster.bandwidth / PAYLOAD / 1e9, color="grey", linestyle=":")
    by_link.set(xlabel="link of a node, Gbit/s", title=f"{cluster.ranks} ranks, {cluster.ranks_per_node} on a node")
    by_ranks.set(
        xlabel="ranks", title=f"{_rate(cluster.bandwidth / PAYLOAD)} a node", xticks=counts, xticklabels=counts
    )
    by_ranks.minorticks_off()
    drawn.legend(loc="outside lower center", ncols=4, fontsize="small")
    drawn.savefig(picture)


def _shown(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By method all of its topologies."""
    ways: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (not row.plain, row.step.seconds)):
        ways.setdefault(row.method, []).append(row)
    return dict(list(ways.items())[: _PLOTTED_METHODS + len(PLAIN)])
