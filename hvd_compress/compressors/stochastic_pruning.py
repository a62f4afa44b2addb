"""Stochastic pruning of weight gradients: small elements become 0 or the threshold (rule of arXiv 1908.00173).

Ye et al. (ECCV 2020) prune the gradients between layers, to save computing time. The same rule is an unbiased
sparsifier of what is sent, and what survives at the threshold costs no more than its sign.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES, SPARE, THRESHOLD, THRESHOLDS, key
from ..schedules import Rate, value_at
from .codec import Codec, Common
from .footprint import Sent
from .frames import dense_room, encode_dense, most_room
from .gradients import flat, flat32
from .slot import Slot

_NORMAL = statistics.NormalDist()
_FURTHEST = 8.0  # that the calibration goes from the threshold of a normal distribution
_DAMPING = 0.15  # so that it settles for uniform elements, too, of which hardly any are far above the mean


@dataclass(frozen=True)
class StochasticPruningCompressor(Codec):
    """Unbiased; 2 bits an element, and 32 more for each that is not below the threshold, which is sent as it is.

    rate: fraction of the elements that are to be below the threshold t, in (0, 1), or a schedule of it. Of these, g
        becomes sign(g) * t with probability |g| / t, else 0.

    The threshold is that of normal elements, Phi^-1((1 + rate) / 2) * sqrt(pi / 2) * mean |g|, times a factor by which
    each rank brings the fraction that it really finds below towards `rate`, as gradients have heavier tails. It is
    never above the largest |g|.
    """

    rate: Rate = 0.9

    algorithm = 12
    stateful = True
    label = "stochastic_pruning"

    def __post_init__(self) -> None:
        self.rate_at(0)

    def rate_at(self, step: int) -> float:
        rate = value_at(self.rate, step)
        if not 0 < rate < 1:
            raise ValueError(f"rate must be in (0, 1): {rate} at step {step}")
        return rate

    def sent(self, slot: Slot) -> Sent:
        """About: so many elements are below the threshold once it is calibrated."""
        numel = slot.parameter.numel
        payload = 4 + kernels.ternary_bytes(numel) + 4 * round((1 - self.rate_of(slot)) * numel)
        return Sent(gathered=wire.frame_bytes(payload if payload <= most_room(numel) else 4 * numel))

    def held(self, slot: Slot) -> dict[str, int]:
        numel = slot.parameter.numel
        threshold = 4 if 4 + kernels.ternary_bytes(numel) <= most_room(numel) else 0
        return {THRESHOLDS: threshold, SPARE: threshold, FRAMES: wire.frame_bytes(most_room(numel))}

    def rate_of(self, slot: Slot) -> float:
        return self.rate_at(slot.step.number)

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        values, rate = flat(gradient), self.rate_of(slot)
        kernel, numel, flags = kernels.of(values), values.numel(), 0
        largest, mean = kernel.magnitudes(values)
        payload: Tensor | None = None
        if largest < math.inf:
            calibration = _calibration(slot)
            threshold = min(calibration * normal_threshold(mean, rate), largest)
            payload = slot.workspace.room(max(dense_room(gradient), 0))
            stream = slot.random_key()
            length = kernel.prune_encode(values, wire.rounded(threshold), stream, payload)
            if length == kernels.TOO_LARGE:
                payload, flags = encode_dense(flat32(gradient), gradient.dtype)[0], wire.DENSE
            else:
                payload = payload[:length]
                if largest:
                    below = numel - kernels.pruned_entries(length, numel)
                    corrected = torch.tensor([calibrated(calibration, rate, below, numel)])
                    slot.memory.propose(key(slot.name, THRESHOLD), corrected)
        return self.framed(slot, gradient, payload, rate=rate, flags=flags)

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).prune_sum(payloads, divisor, out))


def normal_threshold(mean: float, rate: float) -> float:
    """Below which a fraction `rate` of the magnitudes is, if they are those of a normal distribution around zero and
    their mean is `mean`."""
    return _NORMAL.inv_cdf((1 + rate) / 2) * math.sqrt(math.pi / 2) * mean


def calibrated(calibration: float, rate: float, below: int, numel: int) -> float:
    """The factor of the next step, when `below` of `numel` elements were below the threshold in this one."""
    found = min(max(below, 0.5), numel - 0.5) / numel
    correction = _NORMAL.inv_cdf((1 + rate) / 2) / _NORMAL.inv_cdf((1 + found) / 2)
    return min(max(calibration * correction**_DAMPING, 1 / _FURTHEST), _FURTHEST)


def _calibration(slot: Slot) -> float:
    known = slot.memory.residuals.get(key(slot.name, THRESHOLD))
    return 1.0 if known is None else float(known)
