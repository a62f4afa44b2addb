"""No compression: the sum of the gradients as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SummedCompressor
from .footprint import Sent
from .gradients import narrowed
from .slot import Slot


@dataclass(frozen=True)
class NoneCompressor(SummedCompressor):
    """Every gradient as it is; bfloat16 travels as float32, which Horovod and MPI can add."""

    algorithm = 0

    def sent(self, slot: Slot) -> Sent:
        return Sent(reduced=4 * slot.parameter.numel)

    def summand(self, gradient: Tensor, size: int = 1) -> Tensor:
        if gradient.dtype == torch.float16:
            return narrowed(gradient, size)
        return gradient.float() if gradient.dtype == torch.bfloat16 else gradient
