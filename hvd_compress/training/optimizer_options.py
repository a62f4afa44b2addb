"""What the optimizers of this library ask of the options that all of them have."""

from __future__ import annotations

import math

from torch import Tensor


def check(lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ValueError for what cannot work."""
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must not be negative: {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1): {betas}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive: {eps}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must not be negative: {weight_decay}")
