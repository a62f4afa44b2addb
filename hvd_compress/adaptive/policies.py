"""Who chooses: L-GreCo (MLSys 2024, arXiv 2210.17357) and Accordion (MLSys 2021, arXiv 2010.16248). Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .layers import Layer
from .solver import solve


@dataclass(frozen=True)
class Statistics:
    """What a choice is made from, over all ranks; rows are layers, columns their candidates."""

    layers: Sequence[Layer]
    errors: np.ndarray  # float64 [layers, candidates], sums over the ranks
    costs: np.ndarray  # float64 of that shape: bytes or seconds, infinite past a layer's last candidate
    norms: np.ndarray  # float64 [layers], of the mean of what ranks received since the decision before
    previous_norms: dict[str, float]  # by name, at the decision before; empty at the first


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
