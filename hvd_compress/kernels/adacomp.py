"""What AdaComp sends of a gradient (Chen et al., AAAI 2018, arXiv 1712.02679)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LANES = 8


def adacomp_choice(accumulated: Tensor, gradient: Tensor, bin_size: int) -> tuple[Tensor, Tensor, float]:
    """Positions, int64 [n], their signs (negative), bool [n], and the scale of what AdaComp sends of a layer.

    `accumulated` (residual + gradient) and `gradient`: float32 [numel]. An element is sent when |accumulated +
    gradient| reaches the largest |accumulated| of its bin; the scale is the mean of those over all bins. An all-zero
    bin sends nothing.
    """
    bins = torch.nn.functional.pad(accumulated.abs(), (0, -accumulated.numel() % bin_size)).view(-1, bin_size)
    largest = bins.amax(1)
    reach = torch.repeat_interleave(largest, bin_size)[: accumulated.numel()]
    chosen = ((accumulated + gradient).abs() >= reach) & (accumulated != 0)
    positions = torch.nonzero(chosen).view(-1)
    return positions, accumulated[positions] < 0, _mean(largest)


def _mean(values: Tensor) -> float:
    """Mean of float32 [n], 0 of none, in float64 but for the result, and in an order that is the same everywhere.

    Value i is added to sum i % 8; sums 4 to 7 are added to 0 to 3, then 2 and 3 to 0 and 1, then 1 to 0.
    """
    if not values.numel():
        return 0.0
    lanes = torch.nn.functional.pad(values, (0, -values.numel() % _LANES)).view(-1, _LANES)
    sums = np.add.accumulate(lanes.cpu().numpy().astype(np.float64), axis=0)[-1]
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return float(np.float32(sums[0] / values.numel()))
