"""What algorithms do with the values of a gradient, whatever they are."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..memory import MOMENTUM, key
from .slot import Slot


def flat32(gradient: Tensor) -> Tensor:
    """`gradient` as float32 [numel], without a copy where it already is."""
    return gradient.detach().reshape(-1).to(torch.float32)


def flat(gradient: Tensor) -> Tensor:
    """`gradient` as [numel] in a type that the kernels read: as it is where it can be, float64 as float32."""
    values = gradient.detach().reshape(-1)
    return values if values.dtype in (torch.float32, torch.float16, torch.bfloat16) else values.to(torch.float32)


def momentum_of(
    slot: Slot, gradient: Tensor, factor: float, out: Tensor | None = None, *, nesterov: bool = False
) -> Tensor:
    """The next momentum of this rank, factor * last + gradient, float32 [numel], in `out` or new memory; not proposed.

    By Nesterov, factor * (last + gradient). `gradient`: [numel], of a type that the kernels read.
    """
    velocity = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device) if out is None else out
    before = slot.memory.residual(key(slot.name, MOMENTUM), gradient.device)
    kernels.of(gradient).momentum(gradient, before, factor, nesterov, velocity)
    return velocity


def max_abs(values: Tensor) -> float:
    """Largest |value|; infinity when any is not finite, 0 for an empty tensor."""
    return float(kernels.of(values).largest(values))


def narrowed(summand: Tensor, size: int) -> Tensor:
    """Small enough for the sum of so many to fit in float16, if their mean does."""
    return summand / _power_of_two(size) if size > 1 else summand


def widened(total: Tensor, size: int) -> Tensor:
    """Undo `narrowed` for the sum or the mean of float16 summands, in float32; of other types it is as it was."""
    return total.float() * _power_of_two(size) if size > 1 and total.dtype == torch.float16 else total


def _power_of_two(size: int) -> int:
    """The smallest that is at least `size`: no more bits are lost than it has."""
    return 1 << (size - 1).bit_length()
