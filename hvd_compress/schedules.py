"""Rates that change over training: numbers, or functions of the step that give the same number on every rank."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Union

Rate = Union[float, Callable[[int], float]]
"""A density, a number of bits, an approximation rank: constant, or a function of the exchanges finished so far."""

_PROBES = (0, *sorted({round(10 ** (quarter / 4)) for quarter in range(25)}))  # 0, 1, 2, 3, 6, 10, ..., 1,000,000


def value_at(rate: Rate, step: int) -> float:
    """The rate of `step`. Raises ValueError for one that is not finite."""
    value = _value(rate, step)
    if not math.isfinite(value):
        raise ValueError(f"{describe(rate)} gives {value} at step {step}: a rate must be finite")
    return value


def density_at(density: Rate, step: int) -> float:
    """The density of `step`. Raises ValueError for one that is not in (0, 1]."""
    value = _value(density, step)
    if not 0 < value <= 1:
        raise ValueError(f"density must be in (0, 1]: {describe(density)} gives {value} at step {step}")
    return value


def _value(rate: Rate, step: int) -> float:
    return float(rate(step) if callable(rate) else rate)


def entries_of(density: float, numel: int) -> int:
    """How many of `numel` entries that is: ceil(density * numel), at least one of any."""
    return max(math.ceil(density * numel - 1e-9), min(numel, 1))  # 0.07 * 100 is 7.000000000000001


def describe(rate: Rate) -> str:
    """A text that ranks with equal schedules have in common, to be compared between them.

    Numbers and dataclasses are told by their repr; other functions, whose repr holds an address, by what they give at
    some steps up to a million.
    """
    if not callable(rate) or (dataclasses.is_dataclass(type(rate)) and " at 0x" not in repr(rate)):
        return repr(rate)
    return "{" + ", ".join(f"{step}: {_probe(rate, step)}" for step in _PROBES) + "}"


def _probe(rate: Callable[[int], float], step: int) -> str:
    try:
        return repr(float(rate(step)))
    except (ArithmeticError, LookupError, ValueError) as error:  # a table may end where training does
        return type(error).__name__


@dataclass(frozen=True, init=False, repr=False)
class Steps:
    """Constant between steps: (first step, value) pairs, the first of them from step 0.

    >>> schedule = Steps((0, 0.25), (100, 0.0625))
    >>> schedule(99), schedule(100)
    (0.25, 0.0625)
    """

    levels: tuple[tuple[int, float], ...]

    def __init__(self, *levels: tuple[int, float]) -> None:
        starts = [start for start, _ in levels]
        if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:])):
            raise ValueError(f"levels must be (first step, value) pairs from step 0 on, in ascending order: {levels}")
        if not all(math.isfinite(value) for _, value in levels):
            raise ValueError(f"values must be finite: {levels}")
        object.__setattr__(self, "levels", tuple((int(start), value) for start, value in levels))

    @classmethod
    def evenly(cls, values: Sequence[float], total: int) -> Steps:
        """`values` in turn, each for an equal part of `total` steps, and the last one ever after.

        So do bits grow in progressive training, as the 3, 4, 6, 8 of FracTrain (Fu et al., NeurIPS 2020, arXiv
        2012.13113), which moves on when the loss stalls instead.

        >>> Steps.evenly((3, 4, 6, 8), 1000)
        Steps((0, 3), (250, 4), (500, 6), (750, 8))
        """
        if not 1 <= len(values) <= total:
            raise ValueError(f"{total} steps cannot be shared by {len(values)} values")
        return cls(*((total * place // len(values), value) for place, value in enumerate(values)))

    def __call__(self, step: int) -> float:
        place = bisect.bisect_right([start for start, _ in self.levels], step)
        return self.levels[max(place - 1, 0)][1]

    def __repr__(self) -> str:
        return f"Steps({', '.join(map(repr, self.levels))})"


@dataclass(frozen=True)
class ExponentialWarmup:
    """The warm-up of Deep Gradient Compression (arXiv 1712.01887, section 3.3): ever sparser by the same factor.

    interval: steps at each density, in the paper an epoch. final: the density from then on. factor: in (0, 1).

    >>> [ExponentialWarmup(interval=100)(step) for step in (0, 100, 200, 300, 400, 500)]
    [0.25, 0.0625, 0.015625, 0.00390625, 0.001, 0.001]
    """

    interval: int
    final: float = 0.001
    factor: float = 0.25

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step: {self.interval}")
        if not 0 < self.final <= 1:
            raise ValueError(f"final must be a density in (0, 1]: {self.final}")
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must be in (0, 1): {self.factor}")

    def __call__(self, step: int) -> float:
        return max(self.factor ** (step // self.interval + 1), self.final)
