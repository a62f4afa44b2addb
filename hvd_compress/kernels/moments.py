"""Largest magnitude, mean magnitude and standard deviation of a tensor, in one pass."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_STREAMS, _LANES = 4, 8


def deviation(squares: float, total: float, numel: int) -> float:
    """Population standard deviation of `numel` values whose sum is `total`, and the sum of whose squares `squares`."""
    return math.sqrt(max(squares - total * total / numel, 0.0) / numel)


def sums(values: Tensor, shift: float) -> tuple[float, float]:
    """The sums of x - shift and of its square over float32 [numel], numel > 0, in float64.

    In a fixed order, so that every implementation gives the same bits: four quarters of as many rows of eight, each row
    after row in eight lanes; what remains is added to the 32 lanes last; these are added up by halves.
    """
    array = values.detach().cpu().numpy()
    quarter = len(array) // (_STREAMS * _LANES) * _LANES
    done = _STREAMS * quarter
    rows = array[:done].reshape(_STREAMS, -1, _LANES).transpose(1, 0, 2).reshape(-1, _STREAMS * _LANES)
    rest = np.full((0 if done == len(array) else 1, _STREAMS * _LANES), np.float32(shift))
    rest.reshape(-1)[: len(array) - done] = array[done:]
    differences = np.concatenate([rows, rest]).astype(np.float64) - shift
    return _fold(differences), _fold(np.square(differences))


def _fold(rows: np.ndarray) -> float:
    lanes = np.zeros(_STREAMS * _LANES)
    for row in np.array_split(rows, max(len(rows) >> 16, 1)):  # accumulate, unlike sum, has an order
        lanes = np.add.accumulate(np.concatenate([lanes[None], row]), axis=0)[-1]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


def largest_magnitude(values: Tensor) -> float:
    """Largest |value|; infinity when any is not finite, 0 for an empty tensor."""
    if values.numel() == 0:
        return 0.0
    least, most = map(float, values.aminmax())  # no copy; NaN where any is
    largest = max(-least, most)
    return largest if largest == largest else math.inf


def standard_deviation(values: Tensor) -> float:
    """Of the population, about the mean, in float64; of finite values, at least one."""
    if values.device.type != "cpu":
        return float(values.to(torch.float64).std(correction=0))
    values = values.to(torch.float32)
    total, squares = sums(values, float(values[0]))
    return deviation(squares, total, values.numel())


def mean_magnitude(values: Tensor) -> float:
    """Mean |value|, in float64; of finite values, at least one."""
    magnitudes = values.abs()
    if values.device.type != "cpu":
        return float(magnitudes.mean(dtype=torch.float64))
    return sums(magnitudes.to(torch.float32), 0.0)[0] / values.numel()
