"""Deep Gradient Compression: top-k of gradients with their momentum (Lin et al., ICLR 2018, arXiv 1712.01887).

Momentum runs here, before what is small is held back, *instead of* in the optimizer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES, MOMENTUM, RESIDUALS, SPARE, key
from ..requests import Allreduce, Exchange, Total
from ..schedules import Rate, density_at, entries_of
from .base import Compressor
from .codec import Common
from .entries import EntriesCodec
from .footprint import Sent
from .frames import frame_room
from .gradients import flat32, max_abs, momentum_of
from .slot import Slot


@dataclass(frozen=True)
class DGCCompressor(EntriesCodec):
    """Sends the largest of what has accumulated of u, where u <- momentum * u + gradient, six bytes an entry or less.

    Where an entry is sent, u starts anew as well (momentum factor masking). A tensor of which everything is sent, since
    it is small or the density is 1, has plain momentum: nothing of it is stale. So do parameters that are not
    compressed, which this compressor must see as well, as no one else gives them their momentum. Sparse gradients, as
    of embeddings, are added up without.

    density: fraction that is sent, in (0, 1], or a schedule of it; the paper warms up, schedules.ExponentialWarmup.
    momentum, nesterov, weight_decay: as of torch.optim.SGD, which then must have none of its own. Weights decay before
        the momentum, on each rank, as if ranks are averaged.
    clip: limit of the L2 norm of each tensor's gradient, averaged over the ranks; None for none. Every rank clips its
        own gradient, before it accumulates, to clip * sqrt(size): the norm of the mean of independent gradients is that
        much smaller. (The paper has clip / sqrt(size), appendix C, of gradients that are divided by size already.) The
        paper limits the norm of all tensors together; here they leave one by one, before the last of them is known.
        Where ranks are summed instead of averaged, give clip and weight_decay divided by size.
    value_bits: of each entry that is sent, 32, 8 or 4, as of top-k.
    """

    density: Rate = 0.001
    momentum: float = 0.9
    nesterov: bool = False
    clip: float | None = None
    weight_decay: float = 0.0
    value_bits: int = 32

    algorithm = 10
    stateful = True
    takes_all: ClassVar[bool] = True
    replaces: ClassVar[str] = "momentum"

    def __post_init__(self) -> None:
        density_at(self.density, 0)
        self.check_value_bits()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1): {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True needs a momentum above 0")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive, or None for no clipping: {self.clip}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative: {self.weight_decay}")

    def wanted(self, slot: Slot) -> int:
        return entries_of(self.density_of(slot), slot.parameter.numel)

    def grouped(self, slot: Slot) -> bool:
        return slot.parameter.compressed and saves(slot.parameter.numel, self.wanted(slot))

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        if self.grouped(slot):
            return (yield from super().exchange(slot, gradient))
        velocity, step = self._stepped(slot, gradient)
        total: Tensor = yield Allreduce(slot.memory.compensate(slot.name, step), last=True)
        if max_abs(total) == math.inf:
            return None
        self._propose(slot, velocity, torch.zeros_like(step))
        return Total(total)

    def switched_off(self, plain: Compressor) -> Compressor:
        """The momentum stays, which the optimizer does not have."""
        return dataclasses.replace(self, density=1.0)

    def selected(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        density = self.density_of(slot)
        k = entries_of(density, gradient.numel())
        velocity, step = self._stepped(slot, gradient)
        payload: Tensor | None = slot.workspace.room(kernels.sparse_bytes(step.numel(), k))
        kept, residual = slot.memory.room(slot.name, step), slot.memory.residual(slot.name, step.device)
        kernel = kernels.of(step)
        if kernel.topk_encode(step, residual, kept, k, payload) == kernels.NOT_FINITE:
            payload = None
        else:
            assert payload is not None
            if self.momentum:
                velocity[kernel.sparse_positions(payload, step.numel()).to(velocity.device)] = 0
            self._propose(slot, velocity, kept)
        return self.framed(slot, gradient, payload, rate=density)

    @property
    def keeps_momentum(self) -> bool:
        return True

    def sent(self, slot: Slot) -> Sent:
        payload = self.entry_bytes(slot.parameter.numel, self.wanted(slot)) if self.grouped(slot) else 0
        return Sent(gathered=wire.frame_bytes(payload)) if payload else Sent(reduced=4 * slot.parameter.numel)

    def held(self, slot: Slot) -> dict[str, int]:
        residual = 4 * slot.parameter.numel
        momentum = residual if self.momentum else 0
        entries = kernels.sparse_bytes(slot.parameter.numel, self.wanted(slot)) if self.grouped(slot) else 0
        frames = frame_room(entries)
        return {RESIDUALS: residual, MOMENTUM: momentum, SPARE: residual + momentum, FRAMES: frames}

    def density_of(self, slot: Slot) -> float:
        return density_at(self.density if slot.rate is None else slot.rate, slot.step.number)

    def rate_of(self, slot: Slot) -> float | None:
        return self.density_of(slot) if slot.parameter.compressed else None

    def owed(self, slot: Slot, gradient: Tensor) -> Tensor:
        _, step = self.momentum_of(slot, self.prepare(slot, flat32(gradient)))
        return slot.memory.compensate(slot.name, step)

    def prepare(self, slot: Slot, gradient: Tensor) -> Tensor:
        """`gradient`, float32 [numel], clipped, with the decay of the weights; both in units of the scaled loss."""
        loss_scale = slot.step.loss_scale or 1.0
        if self.clip is not None:
            limit = self.clip * loss_scale * math.sqrt(slot.step.size)
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
            gradient = gradient * (limit / norm) if norm > limit else gradient
        if self.weight_decay:
            assert slot.parameter.tensor is not None
            weights = flat32(slot.parameter.tensor).to(gradient.device)
            gradient = gradient.add(weights, alpha=self.weight_decay * loss_scale)
        return gradient

    def momentum_of(self, slot: Slot, gradient: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The new u, in `out` or new memory, and what `gradient`, float32 [numel], adds to the residual with it."""
        if not self.momentum:
            return gradient, gradient
        velocity = momentum_of(slot, gradient, self.momentum, out, nesterov=self.nesterov)
        return velocity, velocity + gradient if self.nesterov else velocity

    def _stepped(self, slot: Slot, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """As `momentum_of`, in memory that is kept for it."""
        prepared = self.prepare(slot, flat32(gradient))
        room = slot.memory.room(key(slot.name, MOMENTUM), prepared) if self.momentum else None
        return self.momentum_of(slot, prepared, room)

    def _propose(self, slot: Slot, velocity: Tensor, residual: Tensor) -> None:
        slot.memory.propose(slot.name, residual)
        if self.momentum:
            slot.memory.propose(key(slot.name, MOMENTUM), velocity)

    def conflict(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Momentum in both would be applied twice; and so would a decay of the weights."""
        for number, group in enumerate(optimizer.param_groups):
            what = f"{type(optimizer).__name__} (parameter group {number})"
            theirs = group.get("momentum") or (group.get("betas") or (0,))[0]
            if self.momentum and theirs:
                return (
                    f"momentum twice: DGC applies momentum={self.momentum} to gradients before it compresses them, and "
                    f"{what} would apply {float(theirs)} to their sum again. Make the optimizer without, "
                    "torch.optim.SGD(..., momentum=0), or the compression, momentum=0."
                )
            if self.weight_decay and group.get("weight_decay"):
                return (
                    f"weight decay twice: {self.weight_decay} by DGC, {group['weight_decay']} by {what}. Give "
                    "weight_decay=0 to one of them: to the optimizer, for decay with momentum as in torch.optim.SGD."
                )
        return None


def saves(numel: int, entries: int) -> bool:
    """Whether a frame of so many entries is smaller than all values, float32, are."""
    return wire.frame_bytes(kernels.sparse_bytes(numel, entries)) < 4 * numel
