"""What the user sees: live progress while methods are trained, and in the end a table that compares them."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common import on_terminal
from hvd_compress.telemetry import Telemetry

_SMOOTHED = 20  # steps


class Report:
    """Rank 0 shows and writes; on the other ranks this is silent."""

    def __init__(self, metric: str, options: argparse.Namespace, rank: int, size: int) -> None:
        self._metric, self._options, self._rank, self._size = metric, options, rank, size
        self._rows: list[dict[str, Any]] = []
        self._step_seconds: list[float] = []
        self._losses: list[float] = []  # of the method that is being trained
        self._curves: dict[str, list[float]] = {}
        watched = on_terminal()
        self._console = Console(quiet=rank != 0, force_terminal=None if watched else False)
        columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        loss = TextColumn("loss {task.fields[loss]:.3f}")
        self._progress = Progress(*columns, loss, console=self._console, disable=rank != 0 or not watched)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self._progress.stop()
        if error is None:
            self._console.print(self._table())
            if self._options.json and self._rank == 0:
                self._options.json.write_text(json.dumps(self._rows, indent=2) + "\n")
            if self._options.plot and self._rank == 0:
                self._plot()
                self._console.print(f"plot: {self._options.plot.resolve()}", soft_wrap=True)

    def track(self, method: str, batches: Iterable[Any], steps: int) -> Iterator[Any]:
        """The batches; what is done with each is a step, which is timed."""
        self._step_seconds.clear()
        self._losses = self._curves[method] = []
        task = self._progress.add_task(method, total=steps, loss=float("nan"))
        for step, batch in enumerate(batches, start=1):
            start = time.perf_counter()
            yield batch
            self._step_seconds.append(time.perf_counter() - start)
            loss = self._losses[-1] if self._losses else float("nan")
            self._progress.update(task, advance=1, loss=loss)
            if not self._console.is_terminal and step % max(steps // 10, 1) == 0:  # where a bar cannot move
                self._console.print(f"{method}: step {step} of {steps}, loss {loss:.3f}")

    def show(self, *, loss: float) -> None:
        self._losses.append(loss)

    def add(self, method: str, value: float, telemetry: Telemetry) -> None:
        """The result of a method: `value` of the metric, and what rank 0 sent, which at one rank is nothing."""
        sent = telemetry.total.sent_bytes > 0
        row = {
            "method": method,
            "seed": self._options.seed,
            "ranks": self._size,
            "metric": self._metric,
            "value": value,
            "bytes_per_step": telemetry.compressed.sent_bytes / len(self._step_seconds) if sent else None,
            "compressed_ratio": telemetry.compressed.compression_ratio if sent else None,
            "total_ratio": telemetry.total.compression_ratio if sent else None,
            "median_step_seconds": statistics.median(self._step_seconds),
        }
        self._rows.append(row)

    def _table(self) -> Table:
        title = f"{self._size} rank{'s' * (self._size > 1)}, seed {self._options.seed}"
        table = Table("method", title=title, caption="Ratios: raw bytes / sent bytes, headers included.")
        for head in (self._metric, "bytes/step,\nrank 0", "ratio,\ncompressed", "ratio,\nwhole model", "median\nstep"):
            table.add_column(head, justify="right")
        for row in self._rows:
            sent = row["bytes_per_step"], row["compressed_ratio"], row["total_ratio"]
            cells = ["-" if x is None else format(x, form) for x, form in zip(sent, (",.0f", ".1f", ".1f"))]
            table.add_row(row["method"], f"{row['value']:.2f}", *cells, f"{1000 * row['median_step_seconds']:.1f} ms")
        return table

    def _plot(self) -> None:
        """Of rank 0's losses, which jump from batch to batch, the means of the last _SMOOTHED steps."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.5), layout="constrained")
        by_step, by_bytes = figure.subplots(1, 2, sharey=True)
        for row in self._rows:
            losses = self._curves[row["method"]]
            means = [statistics.mean(losses[max(0, end - _SMOOTHED) : end]) for end in range(1, len(losses) + 1)]
            steps = range(1, len(means) + 1)
            by_step.plot(steps, means, label=f"{row['method']}: {row['value']:.2f}")
            if row["bytes_per_step"]:
                by_bytes.plot([step * row["bytes_per_step"] / 1e6 for step in steps], means)
        by_step.set(xlabel="step", ylabel="loss", yscale="log")
        by_bytes.set(xlabel="MB that rank 0 has sent", xscale="log")
        by_step.legend(title=self._metric, fontsize="small")
        for axes in (by_step, by_bytes):
            axes.grid(alpha=0.3)
        figure.savefig(self._options.plot)
