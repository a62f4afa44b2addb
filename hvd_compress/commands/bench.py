"""hvd-compress bench: steps of your own model on your own ranks, with each method in turn, beside none and fp16."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..launcher import launcher_of
from ..transports.base import Transport
from . import methods, model_file, tables
from .links import slowest
from .training import Trained, Way, named, way_of

_METHODS = "qsgd,terngrad,topk,powersgd"
_WARM_UP_STEPS = 6  # DDP makes its buckets anew after the first, and memory is made
_BLOCK_SECONDS = 1.0  # that a method trains for, about, before it is the next one's turn
_LEAST_ROUNDS = 3


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="steps of your own model on your own ranks, with each method",
        description=f"{__doc__} Start it by mpirun, horovodrun or torchrun, as your training.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="FILE:FUNCTION",
        help="a function that returns a pair: a model, and a function of a model that computes its loss",
    )
    methods.add_to(parser, _METHODS)
    parser.add_argument("--seconds", type=float, default=30.0, help="for all rounds, about; default 30")
    parser.add_argument("--json", action="store_true", help="all that was measured, for programs")
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    try:
        if not options.json:
            tables.check()
        makers = methods.makers_of(options.methods)
        models = _models(options.model, len(makers))
        way = way_of(launcher_of(os.environ))
        if way.transport.size == 1:
            raise ValueError("one rank has nobody to exchange gradients with: start at least two")
        trained = [
            Trained(text, *model, None if text in way.plain else make(named(text, model[0])), way)
            for (text, make), model in zip(makers.items(), models)
        ]
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    rows = _rounds(trained, way.transport, options.seconds)
    if way.transport.rank == 0:
        if options.json:
            print(json.dumps({"ranks": way.transport.size, "by": way.name, "rows": rows}, indent=1), flush=True)
        else:
            _print(rows, way)
    return 0


def _models(text: str, count: int) -> list[tuple[nn.Module, model_file.Loss]]:
    """So many alike. Raises ValueError for models without a loss."""
    make = model_file.maker(text)
    models = []
    for _ in range(count):
        torch.manual_seed(0)
        model, loss = make()
        if loss is None:
            raise ValueError(f"{text} must return a pair: a model, and a function of it that computes a loss")
        models.append((model, loss))
    return models


def _rounds(trained: Sequence[Trained], transport: Transport, seconds: float) -> list[dict[str, Any]]:
    """Rounds in which every method has a block of steps, in changing order; of each the median, on every rank."""
    steps: dict[str, int] = {}
    whole = 0.0
    for each in trained:
        once = min(_block(each, 1, transport) for _ in range(_WARM_UP_STEPS))
        steps[each.name] = max(1, min(20, round(_BLOCK_SECONDS / once)))
        whole += steps[each.name] * once
    rounds = max(_LEAST_ROUNDS, int(seconds / whole))
    order, shuffle = list(trained), random.Random(0)  # alike on all ranks
    found: dict[str, list[float]] = {each.name: [] for each in trained}
    sent = {each.name: _sent(each) for each in trained}
    with _progress(rounds * len(order), transport.rank) as advance:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for each in order:
                found[each.name].append(_block(each, steps[each.name], transport))
                advance(each.name)
    rows = []
    for each in trained:
        count = rounds * steps[each.name]
        after, before = _sent(each), sent[each.name]
        rows.append(
            {
                "method": each.name,
                "step_seconds": statistics.median(found[each.name]),
                "fastest_seconds": min(found[each.name]),
                "sent_bytes": None if after is None or before is None else (after - before) / count,
                "rounds": rounds,
                "steps_per_round": steps[each.name],
            }
        )
    return rows


def _sent(trained: Trained) -> int | None:
    """By this rank so far; what the launcher's own methods send is not counted."""
    return None if trained.compression is None else trained.compression.telemetry.total.sent_bytes


def _block(trained: Trained, steps: int, transport: Transport) -> float:
    """Seconds of a step on the slowest rank, the same number on all."""
    slowest(transport, 0.0)
    start = time.perf_counter()
    for _ in range(steps):
        trained.step()
    return slowest(transport, (time.perf_counter() - start) / steps)


@contextlib.contextmanager
def _progress(blocks: int, rank: int) -> Iterator[Callable[[str], None]]:
    """A bar on rank 0, where somebody sees it."""
    if rank or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=blocks)
        yield lambda name: progress.update(task, advance=1, description=name)


def _print(rows: Sequence[dict[str, Any]], way: Way) -> None:
    from rich.console import Console
    from rich.table import Table

    none = next(row["step_seconds"] for row in rows if row["method"] == "none")
    table = Table("method", title=f"a step on the slowest of {way.transport.size} ranks, by {way.name}")
    for head in ("median ms", "fastest ms", "speed-up", "MB sent by rank 0", "rounds x steps"):
        table.add_column(head, justify="right")
    for row in sorted(rows, key=lambda row: float(row["step_seconds"])):
        table.add_row(
            row["method"],
            f"{1e3 * row['step_seconds']:.1f}",
            f"{1e3 * row['fastest_seconds']:.1f}",
            f"{none / row['step_seconds']:.2f} x",
            "-" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.4g}",
            f"{row['rounds']} x {row['steps_per_round']}",
        )
    # A launcher gives its ranks a terminal of their own, whose width nobody knows.
    Console(width=100, force_terminal=False, highlight=False).print(table)
