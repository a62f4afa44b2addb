"""Which rate for which layer: least cost within an error budget (L-GreCo, MLSys 2024, arXiv 2210.17357)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..kernels import in_use, native
from ..kernels import solver as reference_solver

# What is larger counts as infinite: sums of so many could overflow, and no gradient or message comes near.
_LARGEST = 2.0**900
_MOST_LEVELS = 1 << 24


@dataclass(frozen=True)
class Plan:
    """One candidate per layer, and what it comes to.

    `cost` and `reference_cost` are of all layers; `error` and `budget` of those that take part in the budget. Sums are
    rounded once, so that they do not depend on the order of the layers. `fell_back`: the programme found nothing within
    the budget, or nothing better than the reference, which it then started from instead.
    """

    choice: tuple[int, ...]
    cost: float
    error: float
    budget: float
    reference_cost: float
    fell_back: bool


def solve(
    errors: ArrayLike, costs: ArrayLike, *, reference: ArrayLike, alpha: float = 1.0, levels: int = 10_000
) -> Plan:
    """Choose candidates of the least total cost whose total error is at most `alpha` times that of the reference.

    `errors` and `costs`: [layers, candidates], at least 0; a cost that is infinite or NaN marks a candidate that the
    layer cannot take; `reference`: a candidate per layer, of finite cost. A candidate with an infinite or NaN error is
    not taken; a layer whose reference has one keeps it and leaves the budget.

    A dynamic programme solves this exactly for errors rounded up to `levels` parts of the budget (zero to none);
    time and memory are proportional to `levels`, which should be many times the layers. Of equal costs it takes the
    fewest parts, then the lower candidate in the last layer where two choices differ; the reference if that has neither
    a higher cost nor a higher error. What rounding up left of the budget is then spent on single layers.

    The plan never costs more than the reference and is never over the budget, but where `alpha` < 1 and nothing fits:
    then it is the reference, which is over. Raises ValueError for shapes and values outside of these.
    """
    errors, costs, reference = _checked(errors, costs, reference)
    if not 0 < alpha < math.inf or not 1 <= levels <= _MOST_LEVELS:
        raise ValueError(f"alpha must be positive and finite, levels in [1, {_MOST_LEVELS}]: {alpha}, {levels}")
    errors, allowed = _restricted(errors, costs, reference)
    fallback = _sums(errors, costs, reference)
    budget = alpha * fallback[1]
    choice = _within(budget, errors, costs, _units(errors, allowed, budget, levels), levels)
    fell_back = choice is None or not (np.array_equal(choice, reference) or _sums(errors, costs, choice) < fallback)
    start = reference if choice is None or fell_back else choice
    choice = _spend_the_rest(budget, errors, costs, allowed, start)
    cost, error = _sums(errors, costs, choice)
    return Plan(tuple(choice.tolist()), cost, error, budget, fallback[0], fell_back)


def _checked(errors: ArrayLike, costs: ArrayLike, reference: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    errors, costs, indices = np.asarray(errors, np.float64), np.asarray(costs, np.float64), np.asarray(reference)
    if errors.ndim != 2 or costs.shape != errors.shape or indices.shape != errors.shape[:1]:
        raise ValueError(
            f"errors and costs must be [layers, candidates], reference [layers]: "
            f"{errors.shape}, {costs.shape}, {indices.shape}"
        )
    if (errors < 0).any() or (costs < 0).any():
        raise ValueError("errors and costs must be at least 0")
    if indices.size and indices.dtype.kind not in "iu":
        raise ValueError(f"reference must hold integers: {indices.dtype}")
    outside = np.flatnonzero((indices < 0) | (indices >= errors.shape[1]))
    if outside.size:
        raise ValueError(f"reference of layer {outside[0]} must be in [0, {errors.shape[1]}): {indices[outside[0]]}")
    indices = indices.astype(np.int32)
    refused = np.flatnonzero(~(costs[np.arange(len(indices)), indices] <= _LARGEST))
    if refused.size:
        raise ValueError(
            f"layer {refused[0]} cannot take its reference, candidate {indices[refused[0]]}: its cost is not finite; "
            f"give the nearest candidate that the layer can take"
        )
    return errors, costs, indices


def _restricted(errors: np.ndarray, costs: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors, and what may be taken; a layer without an error of its reference keeps that, at no error."""
    is_reference = np.arange(errors.shape[1]) == reference[:, None]
    allowed = (errors <= _LARGEST) & (costs <= _LARGEST)  # NaN is neither
    kept = ~(allowed & is_reference).any(axis=1, keepdims=True)
    return np.where(kept, 0.0, errors), np.where(kept, is_reference, allowed)


def _sums(errors: np.ndarray, costs: np.ndarray, choice: np.ndarray) -> tuple[float, float]:
    """Total cost and error, each rounded once."""
    layers = np.arange(len(choice))
    return math.fsum(costs[layers, choice]), math.fsum(errors[layers, choice])


def _units(errors: np.ndarray, allowed: np.ndarray, budget: float, levels: int) -> np.ndarray:
    """Errors in `levels` parts of the budget, rounded up, int32; -1 where more than all, or not allowed."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a budget of 0, or next to it
        parts = np.maximum(np.ceil(errors / budget * levels), 1)
    parts = np.where(errors == 0, 0, parts)
    return np.where(allowed & (parts <= levels), parts, -1).astype(np.int32)


def _within(budget: float, errors: np.ndarray, costs: np.ndarray, units: np.ndarray, levels: int) -> np.ndarray | None:
    """The programme's choice, whose true error is within the budget, too; None if there is none."""
    # Quotients are rounded before they are rounded up: a choice that takes all the parts may be over by the last bit of
    # its sum. One part less outweighs that.
    for parts in (levels, levels - 1):
        choice = _solve_units(units, costs, parts)
        if choice is None or _sums(errors, costs, choice)[1] <= budget:
            return choice
    return None


def _solve_units(units: np.ndarray, costs: np.ndarray, levels: int) -> np.ndarray | None:
    return (reference_solver if in_use() == "torch" else native).solve_units(units, costs, levels)


def _spend_the_rest(
    budget: float, errors: np.ndarray, costs: np.ndarray, allowed: np.ndarray, choice: np.ndarray
) -> np.ndarray:
    """Take cheaper candidates as long as one fits, that which saves most for its error first.

    Half a part for each layer is much where layers are many: 5 % of the budget at 1,000 layers and 10,000 levels.
    """
    layers = np.arange(len(choice))
    while True:
        left = budget - _sums(errors, costs, choice)[1]
        saved = costs[layers, choice][:, None] - costs
        more = errors - errors[layers, choice][:, None]
        fits = allowed & (saved > 0) & (more <= left)
        if not fits.any():
            return choice
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # at no more error: before all others
            gain = np.where(fits, saved / np.maximum(more, 0), -1)
        layer, candidate = np.unravel_index(np.argmax(gain), gain.shape)
        better = choice.copy()
        better[layer] = candidate
        if _sums(errors, costs, better)[1] > budget:  # by the last bit of a difference
            return choice
        choice = better
