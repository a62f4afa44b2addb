"""Compare what `hvd-compress predict` says with what bench-network measured: ROWS=network.json [OUT=rows.json].

For each row of Horovod or of this library under it. A step without communication is the row "bound", of which backward
is the share that it takes here; bytes and work are measured here, by simulated ranks; of the network it knows what
`hvd-compress doctor` measured there.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from network_methods import MODELS, ours
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from hvd_compress.commands.model_file import timed
from hvd_compress.commands.network import speed_of
from hvd_compress.prediction import Cluster, Compute, measured, predicted
from report import read_rows, write_rows

Row = dict[str, Any]

_WITHIN = 0.2  # of the measured step
_NEAR = 1.1  # times the fastest


def compared(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows with the predicted seconds; without those of other back ends."""
    works: dict[tuple[str, str, int], Any] = {}
    for parameters, (make, batch) in MODELS.items():
        of_model = [row for row in rows if row["parameters"] == parameters]
        if not of_model:
            continue
        model = make()
        inputs, wanted = batch(torch.Generator().manual_seed(0))
        alone = timed(model, lambda m, i=inputs, w=wanted: cross_entropy(m(i), w))  # type: ignore[misc]
        named = [(name, torch.zeros(p.shape)) for name, p in model.named_parameters()]
        for row in of_model:
            method, hosts = row["method"].removeprefix("horovod-"), row["hosts"]
            if row["method"] == "bound" or method.startswith(("ddp", "hook", "lgreco")):
                continue
            key = method, parameters, hosts
            if key not in works:
                works[key] = measured(ours(method), named, hosts)
            bound = next(r["step_seconds"] for r in of_model if r["method"] == "bound" and _same(r, row))
            backward = bound * alone.backward_seconds / alone.seconds
            step = predicted(works[key], cluster_of(row), Compute(backward, bound - backward))
            yield row | {"predicted_seconds": step.seconds, "work": dataclasses.asdict(works[key])}


def cluster_of(row: Row) -> Cluster:
    """As doctor has measured it; the hosts of the emulated network share a name."""
    found = row["doctor"]
    return Cluster(row["hosts"], **speed_of(found["links"], found["sums_bits_per_second"]))


def _same(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in ("hosts", "rate_mbit", "parameters"))


def table_of(rows: Sequence[Row]) -> Table:
    table = Table("hosts", "Mbit/s", "parameters", "method", title="a step: predicted and measured")
    for head in ("predicted ms", "measured ms", "ratio"):
        table.add_column(head, justify="right")
    for row in rows:
        measured_ms, predicted_ms = 1e3 * row["step_seconds"], 1e3 * row["predicted_seconds"]
        cells = [f"{predicted_ms:.0f}", f"{measured_ms:.0f}", f"{predicted_ms / measured_ms:.2f}"]
        table.add_row(str(row["hosts"]), f"{row['rate_mbit']:.0f}", row["parameters"], row["method"], *cells)
    return table


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Of all rows, and of each network the method that is predicted to be the fastest."""
    good = [row for row in rows if abs(row["predicted_seconds"] / row["step_seconds"] - 1) <= _WITHIN]
    yield f"{len(good)} of {len(rows)} rows within {100 * _WITHIN:.0f} % ({len(good) / len(rows):.0%})"
    networks = {(row["hosts"], row["rate_mbit"], row["parameters"]): row for row in rows}.values()
    near = 0
    for network in networks:
        same = [row for row in rows if _same(row, network)]
        chosen = min(same, key=lambda row: row["predicted_seconds"])
        fastest = min(same, key=lambda row: row["step_seconds"])
        ratio = chosen["step_seconds"] / fastest["step_seconds"]
        near += ratio <= _NEAR
        where = f"{network['hosts']} hosts, {network['rate_mbit']:.0f} Mbit/s, {network['parameters']}"
        yield f"{where}: recommended {chosen['method']}, {ratio:.2f} times the step of the fastest, {fastest['method']}"
    yield f"{near} of {len(networks)} recommendations within {100 * (_NEAR - 1):.0f} % of the fastest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=os.environ.get("ROWS") or None, help="of bench-network, OUT=")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="JSON")
    options = parser.parse_args()
    if options.rows is None or not options.rows.is_file():
        parser.error("give ROWS=FILE, which make bench-network OUT=FILE METHODS=bound,horovod-none,... has written")
    torch.set_num_threads(1)
    rows = list(compared(read_rows(options.rows)))
    if not rows:
        parser.error(f"{options.rows} has no rows of Horovod or of this library under it, beside the row bound")
    if options.out:
        write_rows(options.out, rows)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table_of(rows))
    for line in summary(rows):
        console.print(line)


if __name__ == "__main__":
    main()
