"""What the examples share and is not their story: options, a rank's share of the data, progress and the results."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from hvd_compress import Compression
from hvd_compress.telemetry import Telemetry

METHODS = [name for name in vars(Compression) if not name.startswith("_")]


def parse_options(description: str, *, methods: str, epochs: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", type=_methods, default=methods, help=f"any of {','.join(METHODS)}")
    parser.add_argument("--epochs", type=int, default=epochs, help="passes over the training data")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    return parser.parse_args()


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        raise argparse.ArgumentTypeError(f"no such method: {', '.join(unknown)} (choose from {', '.join(METHODS)})")
    return methods


class Shard:
    """This rank's share of a dataset, as batches; the same number of them on every rank."""

    def __init__(self, dataset: Dataset, rank: int, size: int, *, seed: int, batch_size: int) -> None:
        self._sampler = DistributedSampler(dataset, size, rank, seed=seed)
        self._loader = DataLoader(dataset, batch_size, sampler=self._sampler, drop_last=True)

    def batches(self, epochs: int) -> Iterator[Any]:
        for epoch in range(epochs):
            self._sampler.set_epoch(epoch)
            yield from self._loader

    def steps(self, epochs: int) -> int:
        return epochs * len(self._loader)


class Report:
    """Live progress while methods are trained, and a table of them at the end; on rank 0, the others are silent."""

    def __init__(self, metric: str, options: argparse.Namespace, rank: int, size: int) -> None:
        self._metric, self._options, self._rank, self._size = metric, options, rank, size
        self._rows: list[dict[str, Any]] = []
        self._step_seconds: list[float] = []
        self._loss = float("nan")
        self._console = Console(quiet=rank != 0)
        columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        loss = TextColumn("loss {task.fields[loss]:.3f}")
        self._progress = Progress(*columns, loss, console=self._console, disable=rank != 0)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self._progress.stop()
        if error is None:
            self._console.print(self._table())
            if self._options.json and self._rank == 0:
                self._options.json.write_text(json.dumps(self._rows, indent=2) + "\n")

    def track(self, method: str, batches: Iterable[Any], steps: int) -> Iterator[Any]:
        """The batches; what is done with each is a step, which is timed."""
        self._step_seconds.clear()
        task = self._progress.add_task(method, total=steps, loss=float("nan"))
        for step, batch in enumerate(batches, start=1):
            start = time.perf_counter()
            yield batch
            self._step_seconds.append(time.perf_counter() - start)
            self._progress.update(task, advance=1, loss=self._loss)
            if not self._console.is_terminal and step % max(steps // 10, 1) == 0:
                self._console.print(f"{method}: step {step} of {steps}, loss {self._loss:.3f}")

    def show(self, *, loss: float) -> None:
        self._loss = loss

    def add(self, method: str, value: float, telemetry: Telemetry) -> None:
        """The result of a method: `value` of the metric, and what it sent. At one rank nothing is sent."""
        sent = telemetry.total.sent_bytes > 0
        steps = len(self._step_seconds)
        row = {
            "method": method,
            "seed": self._options.seed,
            "ranks": self._size,
            self._metric: value,
            "bytes_per_step": telemetry.compressed.sent_bytes / steps if sent else None,
            "compressed_ratio": telemetry.compressed.compression_ratio if sent else None,
            "total_ratio": telemetry.total.compression_ratio if sent else None,
            "median_step_seconds": statistics.median(self._step_seconds),
        }
        self._rows.append(row)

    def _table(self) -> Table:
        ranks = f"{self._size} rank{'s' * (self._size > 1)}, seed {self._options.seed}"
        table = Table(title=ranks, caption="Ratios are raw bytes / sent bytes, headers included.")
        table.add_column("method")
        heads = (self._metric, "bytes/step\nand rank", "ratio,\ncompressed", "ratio,\nwhole model", "median\nstep, ms")
        for head in heads:
            table.add_column(head, justify="right")
        for row in self._rows:
            numbers = ("bytes_per_step", ",.0f"), ("compressed_ratio", ".1f"), ("total_ratio", ".1f")
            sent = ("-" if row[name] is None else format(row[name], form) for name, form in numbers)
            table.add_row(row["method"], f"{row[self._metric]:.2f}", *sent, f"{1000 * row['median_step_seconds']:.1f}")
        return table


def fingerprint(model: nn.Module) -> str:
    """Equal for models whose parameters are equal bit for bit."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def check_equal(fingerprints: list[str]) -> None:
    """Raise unless all ranks ended with the same model."""
    if strays := [rank for rank, theirs in enumerate(fingerprints) if theirs != fingerprints[0]]:
        raise RuntimeError(f"the parameters of ranks {strays} differ from those of rank 0")
