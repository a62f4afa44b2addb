"""Who chooses: L-GreCo (MLSys 2024, arXiv 2210.17357), Accordion (MLSys 2021, arXiv 2010.16248) and FracTrain (NeurIPS
2020, arXiv 2012.13113). Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .layers import Layer
from .solver import solve

_SCALED_BY = 10  # intervals, in FracTrain


@dataclass(frozen=True)
class Statistics:
    """What a choice is made from, over all ranks; rows are layers, columns their candidates."""

    layers: Sequence[Layer]
    errors: np.ndarray  # float64 [layers, candidates], sums over the ranks
    costs: np.ndarray  # float64 of that shape: bytes or seconds, infinite past a layer's last candidate
    norms: np.ndarray  # float64 [layers], of the mean of what ranks received since the decision before
    previous_norms: dict[str, float]  # by name, at the decision before; empty at the first
    losses: Sequence[float] = ()  # the mean over ranks and steps before each decision so far, this one last


@dataclass(frozen=True)
class Decision:
    """A candidate per layer, and what the log is to say of it."""

    choice: list[int]
    record: dict[str, Any]


class Policy(Protocol):
    """Chooses rates; the same options on every rank, though only rank 0 asks it."""

    @property
    def needs_errors(self) -> bool:
        """Whether it looks at errors, which cost time to find out."""

    @property
    def needs_norms(self) -> bool:
        """Whether it looks at norms."""

    @property
    def needs_losses(self) -> bool:
        """Whether it looks at losses, which the script must tell."""

    @property
    def rates(self) -> tuple[float, ...]:
        """Rates that every layer must have among its candidates."""

    @property
    def initial_rate(self) -> float | None:
        """Of all layers before the first decision; None for the compressor's own."""

    def choose(self, statistics: Statistics) -> Decision:
        """The candidate of every layer."""


@dataclass(frozen=True)
class Accordion:
    """Low compression for layers whose gradient norm is changing, high compression for all others.

    low, high: rates of low and of high compression.
    eta: a layer is critical if its norm differs from that of the decision before by at least this part of it.

    The norm is that of the accumulated gradient, as in the paper: the sum over the interval of what the ranks received,
    compressed as it was, divided by the number of steps, so that intervals of two lengths can be compared. The authors
    also go back to low compression when the learning rate is about to drop, which nothing tells us here.
    """

    low: float
    high: float
    eta: float = 0.5

    needs_errors = False
    needs_norms = True
    needs_losses = False

    def __post_init__(self) -> None:
        if not (0 < self.low < math.inf and 0 < self.high < math.inf):
            raise ValueError(f"low and high must be positive rates: {self.low}, {self.high}")
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta must be positive: {self.eta}")

    @property
    def rates(self) -> tuple[float, ...]:
        return float(self.low), float(self.high)

    @property
    def initial_rate(self) -> float | None:
        return float(self.low)

    def is_critical(self, norm: float, previous: float | None) -> bool:
        """Whether a layer must not lose much now; where nothing is known, it is."""
        if not previous or not math.isfinite(norm) or not math.isfinite(previous):
            return True
        return abs(previous - norm) >= self.eta * previous

    def choose(self, statistics: Statistics) -> Decision:
        choice, critical = [], []
        for layer, norm in zip(statistics.layers, statistics.norms.tolist()):
            critical.append(self.is_critical(norm, statistics.previous_norms.get(layer.name)))
            choice.append(layer.rates.index(float(self.low if critical[-1] else self.high)))
        return Decision(choice, {"policy": "accordion", "eta": self.eta, "critical": critical})


@dataclass(frozen=True)
class LGreCo:
    """The least cost whose total error is at most `alpha` times that of a reference.

    reference: None for the compressor's own rate everywhere, or an Accordion whose choice it is.
    levels: into how many parts the error is cut, see `solve`.

    A layer that had no gradient, or one that was not finite, keeps the rate of its reference.
    """

    alpha: float = 1.0
    levels: int = 10_000
    reference: Accordion | None = None

    needs_errors = True
    needs_losses = False

    def __post_init__(self) -> None:
        solve([[0.0]], [[0.0]], reference=[0], alpha=self.alpha, levels=self.levels)  # raises for what cannot work

    @property
    def needs_norms(self) -> bool:
        return self.reference is not None

    @property
    def rates(self) -> tuple[float, ...]:
        return self.reference.rates if self.reference else ()

    @property
    def initial_rate(self) -> float | None:
        return self.reference.initial_rate if self.reference else None

    def choose(self, statistics: Statistics) -> Decision:
        reference = [layer.reference for layer in statistics.layers]
        if self.reference:
            reference = self.reference.choose(statistics).choice
        silent = ~(statistics.errors > 0).any(axis=1, keepdims=True)
        errors = np.where(silent, np.nan, statistics.errors)
        plan = solve(errors, statistics.costs, reference=reference, alpha=self.alpha, levels=self.levels)
        record = {
            "policy": "lgreco" if self.reference is None else "lgreco+accordion",
            "alpha": self.alpha,
            "levels": self.levels,
            "cost": plan.cost,
            "reference_cost": plan.reference_cost,
            "error": plan.error,
            "budget": plan.budget,
            "fell_back": plan.fell_back,
            "reference": reference,
        }
        return Decision(list(plan.choice), record)


@dataclass(frozen=True)
class FracTrain:
    """One rate for all layers, the next of `rates` whenever the loss stalls: progressive fractional quantisation.

    It has stalled when the losses of the `window` - 1 intervals before differ from that of the last one by at most a
    threshold, as a part of the scale of losses. The threshold, `threshold` at first, is multiplied by `decay` at each
    such turning point, after which `window` intervals must pass anew. The scale is the mean over the first ten
    intervals, or over those that there are. An interval is an epoch in the paper, whose Algorithm 1 this is, with the
    window and the scale of its authors' code; their epsilon and alpha are `threshold` and `decay`.
    """

    rates: tuple[float, ...] = (3.0, 4.0, 6.0, 8.0)
    threshold: float = 0.05
    decay: float = 0.3
    window: int = 5

    needs_errors = False
    needs_norms = False
    needs_losses = True

    def __post_init__(self) -> None:
        if len(self.rates) < 2 or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"rates must be two or more positive numbers: {self.rates}")
        if not 0 < self.threshold < math.inf or not 0 < self.decay <= 1:
            raise ValueError(
                f"threshold must be positive, decay positive and at most 1: {self.threshold}, {self.decay}"
            )
        if self.window < 2:
            raise ValueError(f"window must be at least 2 intervals: {self.window}")

    @property
    def initial_rate(self) -> float | None:
        return self.rates[0]

    def turning_points(self, losses: Sequence[float]) -> list[int]:
        """After which intervals the next rate began, by the losses of all so far, counted from 0."""
        found: list[int] = []
        since, threshold = 0, self.threshold
        for last, loss in enumerate(losses):
            if len(found) == len(self.rates) - 1:
                break
            scale = abs(math.fsum(losses[: min(last + 1, _SCALED_BY)]) / min(last + 1, _SCALED_BY))
            recent = losses[max(since, last + 1 - self.window) : last + 1]
            if len(recent) == self.window and all(abs(loss - one) <= threshold * scale for one in recent):
                found.append(last)
                since, threshold = last + 1, threshold * self.decay
        return found

    def choose(self, statistics: Statistics) -> Decision:
        turns = self.turning_points(statistics.losses)
        rate = self.rates[len(turns)]
        record = {"policy": "fractrain", "loss": statistics.losses[-1], "turning_points": turns}
        return Decision([layer.rates.index(rate) for layer in statistics.layers], record)
