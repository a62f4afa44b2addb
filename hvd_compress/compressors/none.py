"""No compression: the sum of the gradients as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Slot, SummedCompressor
from .footprint import Sent


@dataclass(frozen=True)
class NoneCompressor(SummedCompressor):
    """Every gradient as it is; bfloat16 travels as float32, which Horovod and MPI can add."""

    algorithm = 0

    def sent(self, slot: Slot) -> Sent:
        return Sent(reduced=4 * slot.shape.numel())

    def summand(self, gradient: Tensor) -> Tensor:
        return gradient.float() if gradient.dtype == torch.bfloat16 else gradient
