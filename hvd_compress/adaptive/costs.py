"""What a candidate costs: the bytes of its payload, or the seconds that a link takes for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_ROUNDS = 50
_HUBER = 1.345 * 1.4826  # of the median deviation: 95 % as efficient as least squares where the noise is normal
_EXACT = 1e-9  # relative; samples that lie on a line are not told apart by their rounding errors


def bytes_cost(payload_bytes: ArrayLike) -> np.ndarray:
    """Bytes as costs, float64 of the same shape; infinity and NaN stay, they mark what a layer cannot take."""
    costs = np.asarray(payload_bytes, np.float64)
    if (costs < 0).any():
        raise ValueError(f"payload_bytes must be at least 0: {costs.min()}")
    return costs


@dataclass(frozen=True)
class TimeCost:
    """Seconds of a transfer: `latency_seconds` for each message, and its bytes at a bandwidth, which may be infinite.

    With as many messages for each candidate of a layer this leads to the same plan as bytes do; it is the candidates
    that take more rounds than others that pay for it.

    >>> float(TimeCost(latency_seconds=1e-4, bandwidth_bytes_per_second=1e8)(500_000))
    0.0051
    """

    latency_seconds: float
    bandwidth_bytes_per_second: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency_seconds < np.inf:
            raise ValueError(f"latency_seconds must be finite and at least 0: {self.latency_seconds}")
        if not self.bandwidth_bytes_per_second > 0:
            raise ValueError(f"bandwidth_bytes_per_second must be positive: {self.bandwidth_bytes_per_second}")

    def __call__(self, payload_bytes: ArrayLike, *, messages: ArrayLike = 1) -> np.ndarray:
        """Seconds, float64, for `payload_bytes` in that many messages; of one shape, or broadcast to it.

        Infinity and NaN, which mark what a layer cannot take, stay not finite.
        """
        sizes = bytes_cost(payload_bytes)
        counts = np.asarray(messages, np.float64)
        if not (counts >= 0).all():
            raise ValueError("messages must be at least 0")
        finite = np.isfinite(sizes)  # infinity over an infinite bandwidth would be NaN
        transfer = np.where(finite, np.where(finite, sizes, 0) / self.bandwidth_bytes_per_second, sizes)
        return counts * self.latency_seconds + transfer

    @classmethod
    def fit(cls, samples: Iterable[tuple[float, float]]) -> TimeCost:
        """Fit to measured (bytes, seconds), at least two sizes; a minority of stalled transfers does no harm.

        Least squares of the relative errors with Huber's weights, neither latency nor seconds per byte below 0.
        Bandwidth is infinite where more bytes took no longer. Raises ValueError for samples that determine no line.
        """
        sizes, seconds = _checked(samples)
        # In units of the largest, so that neither squares nor sums can overflow.
        size_unit, time_unit = sizes.max(), seconds.max()
        x, t = sizes / size_unit, seconds / time_unit
        scale = t  # then what is predicted; a sample that is too long weighs little from the start
        weights = np.ones_like(t)
        for _ in range(_ROUNDS):
            intercept, slope = _line(x, t, weights / np.square(scale))
            scale = intercept + slope * x
            scale = np.maximum(scale, scale.max() * _EXACT)
            deviations = np.abs(t - (intercept + slope * x)) / scale
            limit = max(_HUBER * float(np.median(deviations)), _EXACT)
            weights = limit / np.maximum(deviations, limit)
        latency = float(intercept * time_unit)
        per_byte = float(slope * time_unit / size_unit)
        return cls(latency, 1 / per_byte if per_byte > 0 else np.inf)


def _checked(samples: Iterable[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(list(samples), np.float64)
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(f"samples must be pairs of bytes and seconds: {table.shape}")
    sizes, seconds = table.T
    if not (np.isfinite(table).all() and (sizes >= 0).all() and (seconds > 0).all()):
        raise ValueError("samples must be finite, bytes at least 0 and seconds positive")
    if len(np.unique(sizes)) < 2:
        raise ValueError("all samples have one size; measure at least two, far apart")
    return sizes, seconds


def _line(x: np.ndarray, t: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Intercept and slope, neither negative, of the least weighted squares."""
    total = weights.sum()
    mean_x, mean_t = (weights * x).sum() / total, (weights * t).sum() / total
    slope = (weights * (x - mean_x) * (t - mean_t)).sum() / (weights * np.square(x - mean_x)).sum()
    if slope <= 0:
        return float(mean_t), 0.0
    intercept = mean_t - slope * mean_x
    if intercept < 0:
        return 0.0, float((weights * x * t).sum() / (weights * np.square(x)).sum())
    return float(intercept), float(slope)
