"""What a rank sends and receives in a step when there are many: simulated ranks, the code that real ones run.

A row a method, topology and number of ranks. All ranks are in this process and there is no network, so only bytes and
the work of one rank mean anything. Options come from the environment: RANKS=8,64,1024 PARAMETERS=1M METHODS=topk,qsgd
TOPOLOGIES=gather,scatter,hierarchical:8 (ranks on a node; bytes received are those from other nodes) STEPS=3
OUT=rows.json.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from network_methods import ours
from rich.console import Console
from rich.table import Table

from hvd_compress.commands import quantities
from hvd_compress.local import LocalRanks
from hvd_compress.prediction import Recorder
from report import write_rows

Row = dict[str, Any]

_METHODS = "terngrad,qsgd,bf16,topk,dgc"
_TENSORS = 8
_DIFFERENT = 8  # gradients; as many ranks as there are share each
_HEADS = ("payload", "sent", "received", "into node", "of fp16", "python ms", "decode ms", "replicas equal")


def measured(method: str, topology: str, ranks: int, parameters: int, steps: int) -> Row:
    side = math.isqrt(parameters // _TENSORS)
    named = [(f"weight{number}", torch.zeros(side, side)) for number in range(_TENSORS)]
    kind, _, per_node = topology.partition(":")
    make = ours(f"{method}:topology={kind!r}" + (f":ranks_per_node={per_node}" if per_node else ""))
    compressions = [make(named) for _ in range(ranks)]
    readers = sorted({0, ranks // 2, ranks - 1})
    together = LocalRanks(compressions, readers=readers)
    first = compressions[0]
    assert first.attached is not None
    recorder = Recorder(first.attached, int(per_node or 1))
    generator = torch.Generator().manual_seed(0)
    known = [
        {name: torch.randn(side, side, generator=generator).pow_(3) for name, _ in named} for _ in range(_DIFFERENT)
    ]
    first.telemetry.watch(records=_TENSORS + 1)
    seconds: dict[str, list[float]] = {"python": [], "decode": []}
    equal = True
    for _ in range(steps):
        recorder.collectives.clear()
        before = first.telemetry.total.sent_bytes
        results = together.exchange([known[rank % _DIFFERENT] for rank in range(ranks)])
        sent = first.telemetry.total.sent_bytes - before
        equal = equal and all(torch.equal(results[0][name], other[name]) for other in results for name, _ in named)
        for compression in compressions:
            compression.settle()
        spans = vars(first.telemetry.history[-1])
        seconds["decode"].append(spans["decode"])
        seconds["python"].append(spans["encode"] + spans["decode"] + spans["python"] - spans["kernels"])
    payload = sum(first.compressor.sent(slot).gathered for slot in first.slots)
    return {
        "method": method,
        "topology": topology,
        "ranks": ranks,
        "parameters": _TENSORS * side * side,
        "payload_bytes": payload,
        "sent_bytes": sent,
        "received_bytes": round(recorder.outside_bytes),
        "into_node_bytes": round(recorder.outside_bytes * int(per_node)) if per_node else None,
        "python_seconds": statistics.median(seconds["python"]),
        "decode_seconds": statistics.median(seconds["decode"]),
        "replicas_equal": equal,
    }


def table_of(rows: Sequence[Row]) -> Table:
    table = Table("method", "topology", "ranks", title="bytes of a rank in a step; simulated ranks")
    for head in _HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        fp16 = 2 * 2 * row["parameters"] * (row["ranks"] - 1) / row["ranks"]
        cells = [f"{row[f'{kind}_bytes']:,}" for kind in ("payload", "sent", "received")]
        cells.append("-" if row["into_node_bytes"] is None else f"{row['into_node_bytes']:,}")
        cells.append(f"{row['received_bytes'] / fp16:.4f}")
        cells += [f"{1e3 * row[f'{kind}_seconds']:.2f}" for kind in ("python", "decode")]
        table.add_row(row["method"], row["topology"], str(row["ranks"]), *cells, str(row["replicas_equal"]))
    return table


def growth(rows: Sequence[Row]) -> Table:
    """What a rank receives with the most ranks, in terms of what it does with the fewest."""
    table = Table("method", "topology", "fewest", "most", "received, most / fewest", title="does it grow?")
    for kind in dict.fromkeys((row["method"], row["topology"]) for row in rows):
        same = sorted((row for row in rows if (row["method"], row["topology"]) == kind), key=lambda row: row["ranks"])
        ratio = same[-1]["received_bytes"] / same[0]["received_bytes"]
        table.add_row(*kind, str(same[0]["ranks"]), str(same[-1]["ranks"]), f"{ratio:.3f}")
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ
    several = {"ranks": "8,64,256", "methods": _METHODS, "topologies": "gather,scatter"}
    for name, default in several.items():
        value = given.get(name.upper()) or default
        parser.add_argument(f"--{name}", default=value, type=lambda text: text.split(","))
    parser.add_argument(
        "--parameters", default=given.get("PARAMETERS") or "1M", type=quantities.count, help="such as 250K, 10M"
    )
    parser.add_argument("--steps", default=int(given.get("STEPS") or 3), type=int)
    parser.add_argument("--out", type=Path, default=given.get("OUT") or None, help="JSON")
    options = parser.parse_args()
    try:
        options.ranks = [int(count) for count in options.ranks]
        for method in options.methods:
            ours(method)
        for topology in options.topologies:
            kind, _, per_node = topology.partition(":")
            if kind == "hierarchical" and (
                not per_node.isdigit() or any(n % int(per_node or 1) for n in options.ranks)
            ):
                raise ValueError(
                    f"give a number of ranks on a node that divides all RANKS, as hierarchical:8: {topology}"
                )
    except ValueError as error:
        parser.error(str(error))
    if options.steps < 1 or min(options.ranks) < 2 or options.parameters < _TENSORS * 1024:
        parser.error(f"STEPS: at least 1; RANKS: at least 2; PARAMETERS: at least {_TENSORS * 1024}")
    return options


def main() -> None:
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 150)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for method in options.methods:
        for topology in options.topologies:
            for ranks in options.ranks:
                rows.append(measured(method, topology, ranks, options.parameters, options.steps))
                if options.out:  # after each: a long benchmark that is ended keeps what it has
                    write_rows(options.out, rows)
    console.print(table_of(rows))
    console.print(growth(rows))


if __name__ == "__main__":
    main()
