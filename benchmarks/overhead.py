"""Where a step's time goes (encode, exchange, decode, Python), what memory compression takes, and what it blocks.

From spans that the library records: of simulated ranks in this process, where nobody waits, and of ranks under Horovod
on this machine. Every option can be given as an environment variable, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import torch
from network_methods import ours
from network_report import machine
from rich.console import Console
from rich.table import Table

from hvd_compress import kernels
from hvd_compress.kernels import native
from hvd_compress.local import LocalRanks
from report import write_rows

Row = dict[str, Any]

_WORKER = Path(__file__).with_name("overhead_worker.py")
_BASELINE = "horovod-none"
_METHODS = "none,fp16,bf16,terngrad,qsgd,topk,adacomp,powersgd,scalecom,dgc"
_BAR_MICROSECONDS = 60  # of Python for a tensor in a step, beyond the kernels
_TENSORS, _NUMEL = 160, 10_000
_KINDS = ("encode", "exchange", "decode", "python", "kernels")


def simulated(method: str, ranks: int, steps: int) -> Row:
    """Medians over steps of rank 0 of several in this process; their gradients are as in a job, but stay the same."""
    named = [(f"weight{number}", torch.zeros(_NUMEL // 100, 100)) for number in range(_TENSORS)]
    compressions = [ours(method)(named) for _ in range(ranks)]
    together = LocalRanks(compressions)
    generator = torch.Generator().manual_seed(0)
    gradients = [{name: torch.randn(p.shape, generator=generator) for name, p in named} for _ in range(ranks)]
    for _ in range(5):
        together.exchange(gradients)
    telemetry = compressions[0].telemetry
    telemetry.watch(records=1)
    found = []
    for _ in range(steps):
        together.exchange(gradients)
        compressions[0].settle()
        found.append(vars(telemetry.history[-1]))
    medians = {f"{kind}_seconds": statistics.median([row[kind] for row in found]) for kind in _KINDS}
    shape = {"where": "simulated", "ranks": ranks, "model": f"{_TENSORS} tensors", "tensors": _TENSORS}
    return shape | {"method": method, "numel": _TENSORS * _NUMEL, **medians}


def with_ratios(row: Row, baseline: Row | None) -> Row:
    """Adds microseconds of Python per tensor, and memory beyond that of `baseline`."""
    if "python_seconds" in row:
        beyond = row["encode_seconds"] + row["decode_seconds"] + row["python_seconds"] - row["kernels_seconds"]
        row["python_microseconds_per_tensor"] = 1e6 * beyond / row["tensors"]
    if baseline is not None:
        row["peak_bytes_over_none"] = row["peak_bytes"] - baseline["peak_bytes"]
    return row


def overlap(numel: int = 25_000_000, seconds: float = 1.0) -> list[Row]:
    """How far a second Python thread gets while kernels run, as a part of what it does while nothing else does."""
    gradient, kept = torch.randn(numel), torch.zeros(numel)
    payload = torch.zeros(4 * numel, dtype=torch.uint8)
    running: dict[str, Callable[[], object]] = {
        "nothing": lambda: time.sleep(0.01),
        "topk_encode": lambda: native.topk_encode(gradient, None, kept, numel // 100, payload),
        "ternary_encode": lambda: native.ternary_encode(gradient, 5.0, 5.0, 1, False, payload),
        "quantise_encode": lambda: native.quantise_encode(gradient, 4, 512, False, 1, False, payload),
        "python": lambda: sum(range(100_000)),  # holds the GIL: what there is to lose
    }
    counted = {name: _progress(function, seconds) for name, function in running.items()}
    return [
        {"where": "overlap", "kernel": name, "progress": count / counted["nothing"]}
        for name, count in counted.items()
        if name != "nothing"
    ]


def _progress(function: Callable[[], object], seconds: float) -> float:
    """What another thread counts up to in a second while this one calls `function` over and over."""
    counts, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counts[0] += 1

    function()
    thread = threading.Thread(target=count)
    thread.start()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        function()
    done.set()
    thread.join()
    return counts[0] / (time.perf_counter() - start)


def table_of(rows: list[Row]) -> Table:
    table = Table("method", "model", title=f"ms a step, {rows[0]['ranks']} ranks, {rows[0]['where']}")
    heads = ("step", *_KINDS[:4], "in kernels", "us Python a tensor", "peak MB over none")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        seconds = [row.get(f"{kind}_seconds") for kind in ("step", *_KINDS)]
        cells = ["-" if value is None else f"{1e3 * value:.2f}" for value in seconds]
        for name, factor in (("python_microseconds_per_tensor", 1.0), ("peak_bytes_over_none", 1e-6)):
            cells.append(f"{factor * row[name]:.1f}" if name in row else "-")
        table.add_row(row["method"], row["model"], *cells)
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ
    methods = given.get("METHODS") or _METHODS
    parser.add_argument("--methods", default=methods, type=lambda text: text.split(","), help="of Compression")
    parser.add_argument("--ranks", type=int, default=int(given.get("RANKS") or 2))
    parser.add_argument("--steps", type=int, default=int(given.get("STEPS") or 40))
    parser.add_argument("--simulated", action="store_true", default=bool(given.get("SIMULATED")), help="no Horovod")
    parser.add_argument("--out", type=Path, default=given.get("OUT") or None, help="JSON")
    options = parser.parse_args()
    try:
        for method in options.methods:
            ours(method)
    except ValueError as error:
        parser.error(str(error))
    return options


def horovods(options: argparse.Namespace) -> list[Row]:
    """Of one job for each method: a process holds on to its peak of memory."""
    rows: list[Row] = []
    for method in (_BASELINE, *options.methods):
        program = [str(_WORKER), "--method", method, "--steps", str(options.steps)]
        rows += jobs.rows_of(program, jobs.on_this_machine(options.ranks))
    baselines = {row["model"]: row for row in rows if row["method"] == _BASELINE}
    return [with_ratios(row, baselines[row["model"]]) for row in rows]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    jobs.prepare()
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(machine(options.ranks) + f"; kernels: {kernels.in_use()}")
    rows = [
        with_ratios(simulated(m, ranks, options.steps), None) for ranks in (1, options.ranks) for m in options.methods
    ]
    for ranks in dict.fromkeys(row["ranks"] for row in rows):
        console.print(table_of([row for row in rows if row["ranks"] == ranks]))
    late = [row["method"] for row in rows if row["python_microseconds_per_tensor"] > _BAR_MICROSECONDS]
    console.print(f"more than {_BAR_MICROSECONDS} us of Python a tensor: {', '.join(dict.fromkeys(late)) or 'none'}")
    if not options.simulated:
        under_horovod = horovods(options)
        console.print(table_of(under_horovod))
        rows += under_horovod
    if kernels.in_use() != "torch":
        beside = overlap()
        for row in beside:
            console.print(f"a second thread, while {row['kernel']} runs: {100 * row['progress']:.0f} % of its pace")
        rows += beside
    if options.out:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
