"""The exact knapsack under the choice of rates: one candidate a layer, least cost within a number of units."""

from __future__ import annotations

import numpy as np


def solve_units(units: np.ndarray, costs: np.ndarray, levels: int) -> np.ndarray | None:
    """The candidate of every layer, int32 [layers], with the least sum of costs and at most `levels` units in all.

    `units`: int32 [layers, candidates], -1 where a layer cannot take a candidate; `costs`: float64 of that shape, where
    it can finite and at least 0. None if no choice fits. Of choices whose costs, added up in float64 in their order,
    are equal, that with the fewest units is taken; of these that with the lower candidate in the last layer where they
    differ. Takes 8 * layers * levels bytes.
    """
    allowed = units >= 0
    if not allowed.any(axis=1).all():
        return None
    # Spent in any case: only what is above it is a choice, and every number of units left has an answer.
    least = np.where(allowed, units, np.iinfo(np.int32).max).min(axis=1, keepdims=True, initial=np.iinfo(np.int32).max)
    extra = np.where(allowed, units.astype(np.int64) - least, -1)
    left = min(levels - int(least.sum(dtype=np.int64)), int(extra.max(axis=1, initial=0).sum()))
    return None if left < 0 else _walk_back(_least_costs(extra, costs, left), extra, costs)


def _least_costs(extra: np.ndarray, costs: np.ndarray, left: int) -> np.ndarray:
    """Float64 [layers + 1, left + 1]: of the first so many layers, with at most so many units."""
    table = np.zeros((len(extra) + 1, left + 1))
    sums = np.empty(left + 1)
    for before, row, layer_extra, layer_costs in zip(table, table[1:], extra.tolist(), costs.tolist()):
        row.fill(np.inf)
        for more, cost in zip(layer_extra, layer_costs):
            if 0 <= more <= left:
                shifted = np.add(before[: left + 1 - more], cost, out=sums[: left + 1 - more])
                np.minimum(row[more:], shifted, out=row[more:])
    return table


def _walk_back(table: np.ndarray, extra: np.ndarray, costs: np.ndarray) -> np.ndarray:
    at = int(np.argmax(table[-1] == table[-1, -1]))  # rows never increase: the first of the least
    choice = np.empty(len(extra), np.int32)
    for layer in reversed(range(len(extra))):
        fits = (extra[layer] >= 0) & (extra[layer] <= at)
        sums = table[layer, np.where(fits, at - extra[layer], 0)] + costs[layer]
        choice[layer] = np.argmax(fits & (sums == table[layer + 1, at]))
        at -= int(extra[layer, choice[layer]])
    return choice
