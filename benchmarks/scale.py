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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from network_methods import ours
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hvd_compress.local import LocalRanks
from hvd_compress.requests import ReduceOp
from hvd_compress.transports.base import Pending
from report import write_rows

Row = dict[str, Any]

_METHODS = "terngrad,qsgd,bf16,topk,dgc"
_TENSORS = 8
_DIFFERENT = 8  # gradients; as many ranks as there are share each
_HEADS = ("payload", "sent", "received", "into node", "of fp16", "python ms", "decode ms", "replicas equal")


class Received:
    """Counts what arrives at one rank from those that are not on its node; sums count as of a ring, in two rounds of
    (size - 1) / size."""

    def __init__(self, transport: Any, ranks_per_node: int) -> None:
        self.count = 0.0
        self.rank, self.size = transport.rank, transport.size
        first = self.rank // ranks_per_node * ranks_per_node
        self._node = range(first, first + ranks_per_node)
        for name in ("allreduce", "allgather", "broadcast", "alltoall"):
            setattr(transport, name, self._counted(getattr(transport, name)))

    def _counted(self, usual: Callable[..., Pending]) -> Callable[..., Pending]:
        def post(name: str, *arguments: Any) -> Pending:
            return _Counted(usual(name, *arguments), self, arguments)

        return post

    def add(self, answer: Tensor | Sequence[Tensor], arguments: Sequence[Any]) -> None:
        if not isinstance(answer, Tensor):
            self.count += sum(buffer.numel() for rank, buffer in enumerate(answer) if rank not in self._node)
        elif isinstance(arguments[-1], ReduceOp):
            self.count += 2 * answer.numel() * answer.element_size() * (self.size - 1) / self.size
        elif arguments[-1] != self.rank:  # a broadcast, by this root
            self.count += answer.numel() * answer.element_size()


class _Counted(Pending):
    def __init__(self, usual: Pending, received: Received, arguments: Sequence[Any]) -> None:
        self._usual, self._received, self._arguments = usual, received, arguments

    def ready(self) -> bool:
        return self._usual.ready()

    def await_ready(self, meanwhile: Callable[[], None] | None = None) -> None:
        self._usual.await_ready(meanwhile)

    def wait(self) -> Any:
        answer = self._usual.wait()
        self._received.add(answer, self._arguments)
        return answer


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
    received = Received(first.attached, int(per_node or 1))
    generator = torch.Generator().manual_seed(0)
    known = [
        {name: torch.randn(side, side, generator=generator).pow_(3) for name, _ in named} for _ in range(_DIFFERENT)
    ]
    first.telemetry.watch(records=_TENSORS + 1)
    seconds: dict[str, list[float]] = {"python": [], "decode": []}
    equal = True
    for _ in range(steps):
        received.count, before = 0.0, first.telemetry.total.sent_bytes
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
        "received_bytes": round(received.count),
        "into_node_bytes": round(received.count * int(per_node)) if per_node else None,
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


def _number(text: str) -> int:
    factor = {"K": 10**3, "M": 10**6}.get(text[-1:].upper(), 1)
    return round(float(text[:-1] if factor > 1 else text) * factor)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ
    several = {"ranks": "8,64,256", "methods": _METHODS, "topologies": "gather,scatter"}
    for name, default in several.items():
        value = given.get(name.upper()) or default
        parser.add_argument(f"--{name}", default=value, type=lambda text: text.split(","))
    parser.add_argument("--parameters", default=given.get("PARAMETERS") or "1M", type=_number, help="such as 250K, 10M")
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
