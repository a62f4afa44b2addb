"""Means, paired differences and their confidence intervals, as a table and as a plot of quality against bytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy.stats import t as student

Row = Mapping[str, Any]
BASELINE = "none"
_TWIN = "acdc, dense twin"


@dataclass(frozen=True)
class Summary:
    """One method of one task at one number of ranks and of epochs, over its seeds."""

    task: str
    ranks: int
    epochs: int
    method: str
    seeds: int
    mean: float
    deviation: float  # of the sample; NaN of one seed
    difference: float  # mean of (method - none) over the seeds that both have; NaN if there are none
    half_width: float  # of the 95 % confidence interval of that mean, Student's t; NaN of fewer than two seeds
    bytes_per_step: float
    metric: str

    @property
    def place(self) -> tuple[str, int, int]:
        """What is compared with each other."""
        return self.task, self.ranks, self.epochs


def with_twins(rows: Sequence[Row]) -> list[Row]:
    """The rows, and one of its own for each dense twin."""
    twins = [r | {"method": _TWIN, "metric": r["dense_twin_metric"]} for r in rows if "dense_twin_metric" in r]
    return [*rows, *twins]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """In the order of the rows."""
    rows = with_twins(rows)
    groups: dict[tuple[str, int, int, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["ranks"], row["epochs"], row["method"]), {})[row["seed"]] = row
    return [_summary(key, of_seed, groups.get((*key[:3], BASELINE), {})) for key, of_seed in groups.items()]


def _summary(key: tuple[str, int, int, str], of_seed: Mapping[int, Row], baseline: Mapping[int, Row]) -> Summary:
    metrics = [row["metric"] for row in of_seed.values()]
    differences = [row["metric"] - baseline[seed]["metric"] for seed, row in of_seed.items() if seed in baseline]
    first = next(iter(of_seed.values()))
    return Summary(
        *key,
        seeds=len(metrics),
        mean=statistics.fmean(metrics),
        deviation=statistics.stdev(metrics) if len(metrics) > 1 else math.nan,
        difference=statistics.fmean(differences) if differences else math.nan,
        half_width=half_width(differences),
        bytes_per_step=statistics.fmean(row["bytes_per_rank_per_step"] for row in of_seed.values()),
        metric=first["metric_name"],
    )


def half_width(differences: Sequence[float], confidence: float = 0.95) -> float:
    """Of the confidence interval of their mean: t * s / sqrt(n), t of n - 1 degrees of freedom."""
    n = len(differences)
    if n < 2:
        return math.nan
    quantile = float(student.ppf((1 + confidence) / 2, n - 1))
    return quantile * statistics.stdev(differences) / math.sqrt(n)


HEADS = (
    "method",
    "seeds",
    "mean",
    "standard deviation",
    "difference to none, 95 %",
    "bytes per rank and step",
    "ratio",
)


def cells_of(summary: Summary, dense_bytes: float) -> list[str]:
    digits = 2 if summary.mean > 10 else 3
    difference = f"{summary.difference:+.{digits}f} ± {summary.half_width:.{digits}f}"
    return [
        summary.method,
        str(summary.seeds),
        f"{summary.mean:.{digits}f}",
        f"{summary.deviation:.{digits}f}",
        "" if summary.method == BASELINE else difference,
        f"{summary.bytes_per_step:,.0f}",
        f"{dense_bytes / summary.bytes_per_step:.1f}",
    ]


def sections(rows: Sequence[Row]) -> list[tuple[str, list[list[str]]]]:
    """A title and the cells of its rows, for each task, number of ranks and of epochs."""
    found = []
    for (task, ranks, epochs), mine in panels(rows).items():
        dense = next((s.bytes_per_step for s in mine if s.method == BASELINE), math.nan)
        simulated = ", simulated" if any(r.get("simulated") for r in rows if r["ranks"] == ranks) else ""
        title = f"{task}, {ranks} ranks{simulated}, {epochs} epochs: {mine[0].metric}"
        found.append((title, [cells_of(s, dense) for s in mine]))
    return found


def panels(rows: Sequence[Row]) -> dict[tuple[str, int, int], list[Summary]]:
    found: dict[tuple[str, int, int], list[Summary]] = {}
    for summary in summarize(rows):
        found.setdefault(summary.place, []).append(summary)
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    found = []
    for title, cells in sections(rows):
        table = Table(title=title)
        for number, head in enumerate(HEADS):
            table.add_column(head, justify="right" if number else "left")
        for row in cells:
            table.add_row(*row)
        found.append(table)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The tables as Markdown, for docs/accuracy.md."""
    lines = []
    for title, cells in sections(rows):
        lines += ["", f"**{title}**", "", f"| {' | '.join(HEADS)} |", "|---|" + "---:|" * (len(HEADS) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines[1:]) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """What was reached against bytes, with the standard deviation: a panel for each section of the tables."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = panels(rows)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.5), squeeze=False)
    for axis, ((task, ranks, epochs), mine) in zip(axes[0], shown.items()):
        for number, s in enumerate(mine):
            error = 0 if math.isnan(s.deviation) else s.deviation
            marker = "osD^v<>PX*"[number % 10]
            axis.errorbar(s.bytes_per_step, s.mean, error, fmt=marker, capsize=2, label=s.method)
        axis.set(xscale="log", xlabel="bytes per rank and step", ylabel=mine[0].metric)
        axis.set_title(f"{task}, {ranks} ranks, {epochs} epochs")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
