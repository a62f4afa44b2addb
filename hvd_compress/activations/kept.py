"""What is left of saved tensors, and how it becomes them again."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import kernels

_NARROW = (torch.uint8, torch.int16, torch.int32)


class Kept(abc.ABC):
    """What is left of a tensor's elements, in the order of memory."""

    bits = 0  # an element, of what is quantised
    counted = False  # among what the pass has kept

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """That it takes."""

    @abc.abstractmethod
    def restored(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The elements again, or what gives the same gradient in their place."""


class Nothing(Kept):
    """Of tensors whose shape is all that backward needs."""

    nbytes = 0

    def restored(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)


class Quantised(Kept):
    """Codes between the smallest and the largest value of each block."""

    def __init__(self, payload: Tensor, bits: int) -> None:
        self.payload, self.bits = payload, bits

    @property
    def nbytes(self) -> int:
        return self.payload.numel()

    def restored(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = torch.empty(numel, dtype=torch.float32, device=device)
        kernels.of(values).affine_decode(self.payload, self.bits, values)
        return values.to(dtype)


class Mask(Kept):
    """A bit an element, for one of two values."""

    def __init__(self, mask: Tensor, no: Any = False, yes: Any = True) -> None:
        self._packed, self._no, self._yes = _packed(mask), no, yes

    @property
    def nbytes(self) -> int:
        return self._packed.numel()

    def restored(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        mask = _unpacked(self._packed, numel)
        if dtype == torch.bool:
            return mask
        return mask.to(dtype).mul_(self._yes - self._no).add_(self._no)


class Whole(Kept):
    """Whole numbers, in fewer bytes."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    @property
    def nbytes(self) -> int:
        return self._values.nbytes

    def restored(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._values.to(dtype)


class Handle:
    """A saved tensor: what is left of its elements, and how they lay in memory."""

    __slots__ = ("_device", "_dtype", "_kept", "_shape", "_stride")

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self._kept = kept
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._stride = tensor.stride() if is_dense(tensor) else None

    def restored(self) -> Tensor:
        values = self._kept.restored(self._shape.numel(), self._dtype, self._device)
        return values.view(self._shape) if self._stride is None else values.as_strided(self._shape, self._stride)


@torch.no_grad()
def unpack(held: Any) -> Tensor:
    """Called by autograd for what it holds in place of a saved tensor, when backward needs that."""
    return held.restored() if isinstance(held, Handle) else held


def without_loss(values: Tensor) -> Kept | None:
    """Of a mask, or of whole numbers [numel]; None where there is nothing to gain."""
    if values.dtype == torch.bool:
        return Mask(values)
    low, high = (int(bound) for bound in values.aminmax())
    for dtype in _NARROW:
        if dtype.itemsize < values.element_size() and torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return Whole(values.to(dtype))
    return None


def _packed(mask: Tensor) -> Tensor:
    """Eight elements a byte, uint8, of bool [numel]."""
    if mask.is_cpu:
        return torch.from_numpy(np.packbits(mask.numpy()))
    eights = nn.functional.pad(mask, (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (eights << _places(mask)).sum(1, dtype=torch.uint8)


def _unpacked(eights: Tensor, numel: int) -> Tensor:
    """bool [numel], of uint8."""
    if eights.is_cpu:
        return torch.from_numpy(np.unpackbits(eights.numpy(), count=numel)).view(torch.bool)
    return (eights[:, None] >> _places(eights)).bitwise_and_(1).view(-1)[:numel].view(torch.bool)


def _places(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)


def is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own, to be read element by element."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_complex()


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def flattened(tensor: Tensor) -> Tensor:
    """Its elements [numel]: in the order of memory where they fill a stretch of it, else in that of its dimensions."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)
