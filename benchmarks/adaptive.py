"""Uniform rates against L-GreCo, Accordion and both, on simulated ranks: bytes, error, what the model learns.

Every rank's gradients come from its own batches, and are exchanged as in a job; only the network is missing. Bytes are
those of the compressed tensors, headers and the plans' own traffic included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from hvd_compress import Compression, GradientCompression
from hvd_compress.adaptive import Accordion
from hvd_compress.local import LocalRanks
from report import write_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import digits
import stdlib_text
from common import Shard

POLICIES = ("uniform", "lgreco", "accordion", "both")
_DECISIONS = 12  # in a training
_SHOWN = ["task", "family", "policy", "seed", "bytes", "relative_error", "metric", "decision_seconds", "train_seconds"]


@dataclass(frozen=True)
class Task:
    """What is trained, as in the example of that name."""

    load: Callable[[], Any]
    model: Callable[[], nn.Module]
    score: Callable[[nn.Module, Any], float]
    metric: str
    epochs: int
    batch_size: int
    lr: float
    clip: float | None = None


@dataclass(frozen=True)
class Family:
    """A compressor at the rate that is uniform; twice and half of it are Accordion's low and high compression."""

    make: Callable[..., GradientCompression]
    rate: float
    option: str
    rates: tuple[float, ...]  # that L-GreCo chooses from


TASKS = {
    "char_lm": Task(
        stdlib_text.load, stdlib_text.CharLM, stdlib_text.nats_per_character, "validation nats/char", 1, 8, 2.0, 0.5
    ),
    "digits": Task(digits.load, digits.make_model, digits.accuracy, "test accuracy, %", 20, 32, 0.05),
}
FAMILIES = {
    "qsgd": Family(Compression.qsgd, 4, "bits", tuple(range(2, 9))),
    "topk": Family(Compression.topk, 0.01, "density", tuple(0.01 * 2 ** (step / 4) for step in range(-8, 9))),
    "powersgd": Family(Compression.powersgd, 4, "approximation_rank", tuple(range(1, 17))),
}


def adapted(
    base: GradientCompression, family: Family, policy: str, alpha: float, options: dict[str, Any]
) -> GradientCompression:
    low, high = 2 * family.rate, family.rate / 2
    if policy == "uniform":
        return base
    if policy == "accordion":
        return Compression.accordion(base, low, high, **options)
    reference = Accordion(low=low, high=high) if policy == "both" else None
    return Compression.lgreco(base, alpha=alpha, reference=reference, rates=family.rates, **options)


class Run:
    """One training by simulated ranks that share a model, since their replicas are equal."""

    def __init__(self, task: Task, family: Family, policy: str, seed: int, options: argparse.Namespace) -> None:
        torch.manual_seed(seed)
        self.task, self.policy, self.seed, self.alpha = task, policy, seed, options.alpha
        train, self.test = task.load()
        self.model = task.model()
        self.shards = [
            Shard(train, rank, options.ranks, seed=seed, batch_size=task.batch_size) for rank in range(options.ranks)
        ]
        self.steps = self.shards[0].steps(task.epochs)
        self.interval = options.interval or max(self.steps // _DECISIONS, options.window)
        log = {"log": options.log} if options.log else {}
        adaptive = {"interval": self.interval, "window": options.window} | log
        named = list(self.model.named_parameters())
        make = {family.option: family.rate, "seed": seed}
        self.compressions = [
            adapted(family.make(named, **make), family, policy, options.alpha, adaptive) for _ in range(options.ranks)
        ]
        self.ranks = LocalRanks(self.compressions)
        self.errors: list[float] = []
        self.norms: list[float] = []

    def row(self) -> dict[str, Any]:
        start = time.perf_counter()
        measuring = self._train()
        seconds = time.perf_counter() - start - measuring
        controllers = [c.controller for c in self.compressions if c.controller is not None]
        first, telemetry = self.compressions[0].controller, self.compressions[0].telemetry
        extra = first.sent_bytes if first else 0
        return {
            "policy": self.policy,
            "seed": self.seed,
            "bytes": telemetry.compressed.sent_bytes + extra,
            "total_bytes": telemetry.total.sent_bytes + extra,
            "error": statistics.fmean(self.errors),
            "relative_error": sum(self.errors) / sum(self.norms),
            "metric": self.task.score(self.model, self.test),
            "decision_seconds": sum(controller.seconds for controller in controllers),
            "decisions": first.number if first else 0,
            "train_seconds": seconds,  # of all ranks, one after the other, as decision_seconds
            "ranks": len(self.compressions),
            "steps": self.steps,
            "interval": self.interval,
            "alpha": self.alpha,
            "metric_name": self.task.metric,
        }

    def _train(self) -> float:
        """Returns the seconds that went into measuring errors."""
        optimizer = torch.optim.SGD(self.model.parameters(), self.task.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.task.lr, self.steps, cycle_momentum=False)
        measuring = 0.0
        for step, batches in enumerate(zip(*(shard.batches(self.task.epochs) for shard in self.shards))):
            gradients = [self._gradients(*batch) for batch in batches]
            combined = self.ranks.exchange(gradients)[0]
            if step % 5 == 4:
                start = time.perf_counter()
                self._measure(gradients)
                measuring += time.perf_counter() - start
            for name, parameter in self.model.named_parameters():
                parameter.grad = combined[name]
            if self.task.clip:
                clip_grad_norm_(self.model.parameters(), self.task.clip)
            optimizer.step()
            schedule.step()
        return measuring

    def _gradients(self, inputs: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        cross_entropy(self.model(inputs), wanted).backward()
        return {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}

    def _measure(self, gradients: list[dict[str, torch.Tensor]]) -> None:
        """Add up, over ranks and compressed layers, what was lost in this step, and the norms of the gradients."""
        lost = norm = 0.0
        for compression, mine in zip(self.compressions, gradients):
            rates = {slot.name: slot.rate for slot in compression.slots}  # before settle: those of this step
            compression.settle()
            for name, gradient in self._compressed(compression, mine):
                norm += float(gradient.norm())
                residual = compression.memory.residuals.get(name)
                if residual is not None:
                    lost += float(residual.norm())
                else:
                    compressor: Any = compression.compressor
                    rate = compressor.bits if rates[name] is None else rates[name]
                    lost += compressor.errors(gradient, [rate])[0]
        self.errors.append(lost)
        self.norms.append(norm)

    def _compressed(
        self, compression: GradientCompression, gradients: dict[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return ((slot.name, gradients[slot.name]) for slot in compression.slots if slot.parameter.compressed)


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Means and standard deviations over the seeds."""
    table = Table("task", "family", "policy", title="Means over seeds, +- standard deviation")
    for head in ("bytes / uniform", "error", "relative error", "metric", "decisions, % of 1000 steps"):
        table.add_column(head, justify="right")
    for task, family, policy in dict.fromkeys((row["task"], row["family"], row["policy"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["family"], row["policy"]) == (task, family, policy)]
        uniform = {
            row["seed"]: row["bytes"]
            for row in rows
            if (row["task"], row["family"], row["policy"]) == (task, family, "uniform")
        }
        ratios = [row["bytes"] / uniform[row["seed"]] for row in mine if row["seed"] in uniform]
        cost = statistics.fmean([_decision_percent(row) for row in mine])
        cells = [_spread(ratios)] + [
            _spread([row[key] for row in mine]) for key in ("error", "relative_error", "metric")
        ]
        table.add_row(task, family, policy, *cells, f"{cost:.3f}")
    return table


def _decision_percent(row: dict[str, Any]) -> float:
    """Of the time that training takes between two decisions of the default interval."""
    step = row["train_seconds"] / row["steps"]
    return 100 * row["decision_seconds"] / max(row["decisions"], 1) / (1000 * step)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes against what the model learnt, a panel for each task and family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["task"], row["family"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False)
    for axis, (task, family) in zip(axes[0], panels):
        for policy in POLICIES:
            mine = [r for r in rows if (r["task"], r["family"], r["policy"]) == (task, family, policy)]
            axis.scatter([r["bytes"] / 1e6 for r in mine], [r["metric"] for r in mine], label=policy)
            if mine:
                axis.set_ylabel(mine[0]["metric_name"])
        axis.set(title=f"{task}, {family}", xlabel="MB sent by a rank")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    environment = os.environ.get
    for name, known in (("tasks", TASKS), ("families", FAMILIES), ("policies", POLICIES)):
        chosen = environment(name.upper()) or ",".join(known)
        parser.add_argument(f"--{name}", default=chosen, help=f"some of {','.join(known)}")
    parser.add_argument("--seeds", default=environment("SEEDS") or "0,1,2", help="one training each")
    parser.add_argument("--ranks", type=int, default=environment("RANKS") or 4)
    parser.add_argument("--interval", type=int, default=0, help="steps between decisions; 0 for a part of the training")
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=environment("ALPHA") or 1.0, help="L-GreCo's share of the error")
    parser.add_argument("--out", type=Path, default=environment("OUT"), help="file for the rows; a plot goes beside it")
    parser.add_argument("--log", type=Path, help="append the plans there")
    options = parser.parse_args()
    for name, known in (("tasks", TASKS), ("families", FAMILIES), ("policies", POLICIES)):
        chosen = getattr(options, name).split(",")
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"--{name}: no such thing as {', '.join(unknown)} (choose from {', '.join(known)})")
        setattr(options, name, chosen)
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    console = Console(width=150)
    rows: list[dict[str, Any]] = []
    for task in options.tasks:
        for family in options.families:
            for policy in options.policies:
                for seed in options.seeds:
                    run = Run(TASKS[task], FAMILIES[family], policy, seed, options)
                    rows.append({"task": task, "family": family} | run.row())
                    console.print(" ".join(f"{key}={_short(rows[-1][key])}" for key in _SHOWN), soft_wrap=True)
                    if options.out:  # after each run: a long benchmark that is ended keeps what it has
                        write_rows(options.out, rows)
    console.print(table_of(rows))
    if options.out:
        plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
