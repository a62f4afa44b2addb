"""ScaleCom: one rank in turn picks the entries for all (Chen et al., NeurIPS 2020, arXiv 2104.11125).

What a rank sends and receives does not grow with the number of ranks, since all of them send the same entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..memory import RESIDUALS, SPARE
from ..requests import Allreduce, Broadcast, Exchange, Total
from ..schedules import Rate, density_at, entries_of
from ..wire import WireError
from .base import Compressor
from .footprint import Sent
from .gradients import flat, flat32, max_abs
from .slot import Slot


@dataclass(frozen=True)
class ScaleComCompressor(Compressor):
    """CLT-k: the leader, rank step mod size, picks the largest |residual + gradient| of its own, and all ranks send
    theirs at those positions. Four bytes an entry, and four more from the leader. Small tensors travel as they are.

    density: fraction that is sent, in (0, 1], or a schedule of it.
    beta: of the low-pass filter residual <- residual + beta * (gradient - sent), in (0, 1]. 1 is plain error feedback.
        Less is *not lossless*: of a gradient that was not sent, only beta of it is kept, and of a residual that was
        sent, 1 - beta of it stays. It is meant for large batches and learning rates; section 3 of the paper.
    chunk: the leader picks the largest of each chunk of so many elements, which takes no sort; `density` is not used.
    """

    density: Rate = 0.001
    beta: float = 1.0
    chunk: int | None = None

    algorithm = 9
    slow_with_adam: ClassVar[bool] = True
    stateful = True

    def __post_init__(self) -> None:
        density_at(self.density, 0)
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be in (0, 1]: {self.beta}")
        if self.chunk is not None and not (isinstance(self.chunk, int) and self.chunk >= 1):
            raise ValueError(f"chunk must be a whole number of elements, or None for no chunks: {self.chunk!r}")

    def sent(self, slot: Slot) -> Sent:
        numel = slot.parameter.numel
        k = self.entries(slot, numel)
        if not saves(numel, k):
            return Sent(reduced=4 * numel)
        return Sent(reduced=4 * (k + 1), broadcast=_index_type(numel).itemsize * k)

    def held(self, slot: Slot) -> dict[str, int]:
        return {RESIDUALS: 4 * slot.parameter.numel, SPARE: 4 * slot.parameter.numel}

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        numel = gradient.numel()
        k = self.entries(slot, numel)
        if not saves(numel, k):
            return (yield from _as_it_is(self, slot, gradient))
        leader = slot.step.number % slot.step.size
        values, accumulated = flat(gradient), slot.memory.room(slot.name, gradient)
        residual = slot.memory.residual(slot.name, accumulated.device)
        picked = self._pick(values, residual, accumulated, k, leads=slot.step.rank == leader)
        finite = picked is not None
        picks = torch.arange(k) if picked is None else picked
        positions: Tensor = yield Broadcast(picks.to(accumulated.device, _index_type(numel)), leader)
        positions = positions.to(torch.int64)
        sound = are_positions(positions, k, numel)
        if not sound:
            positions = torch.arange(k, device=accumulated.device)
        # How many ranks have what is not finite, which need not be at these positions, and, past the number of ranks,
        # how many got no positions: so all ranks learn of both.
        flag = accumulated.new_tensor([(not finite) + (not sound) * (slot.step.size + 1.0)])
        summed: Tensor = yield Allreduce(torch.cat([accumulated[positions], flag]), last=True)
        summed, flags = summed[:-1], float(summed[-1])
        if flags > slot.step.size:
            found = "others on this rank" if not sound else "others on another rank"
            raise WireError(leader, slot.name, f"{k} ascending positions below {numel}", found)
        if flags or (largest := max_abs(summed)) == math.inf:
            return None
        accumulated[positions] = 0
        slot.memory.propose(slot.name, self._filtered(residual, accumulated))
        divisor = slot.step.divisor
        values = slot.room_for_sum(accumulated).zero_().index_copy_(0, positions, summed / divisor)
        return Total(values, divisor, largest)

    def rate_of(self, slot: Slot) -> float:
        """The density of this step."""
        if self.chunk is not None:
            return 1 / self.chunk
        return density_at(self.density if slot.rate is None else slot.rate, slot.step.number)

    def entries(self, slot: Slot, numel: int) -> int:
        """How many entries are sent: the same on every rank."""
        return -(-numel // self.chunk) if self.chunk is not None else entries_of(self.rate_of(slot), numel)

    def _pick(
        self, gradient: Tensor, residual: Tensor | None, accumulated: Tensor, k: int, *, leads: bool
    ) -> Tensor | None:
        """`accumulated` = residual + gradient; returns the positions to send, int64 [k], of a rank that leads.

        Of others they are any. None where something is not finite.
        """
        kernel = kernels.of(gradient)
        if not leads or self.chunk is not None:
            finite = kernel.accumulate(gradient, residual, accumulated) < math.inf
            if not leads or not finite:
                return torch.arange(k) if finite else None
            return kernel.chunk_largest(accumulated, self.chunk)
        payload = torch.empty(kernels.sparse_bytes(gradient.numel(), k), dtype=torch.uint8)
        if kernel.topk_encode(gradient, residual, accumulated, k, payload) == kernels.NOT_FINITE:
            return None
        values, positions = (part.to(accumulated.device) for part in kernels.unpack_sparse(payload, gradient.numel()))
        accumulated[positions] = values
        return positions

    def _filtered(self, residual: Tensor | None, unsent: Tensor) -> Tensor:
        """The new residual, in the memory of `unsent`."""
        if self.beta == 1:
            return unsent
        return unsent.mul_(self.beta) if residual is None else torch.lerp(residual, unsent, self.beta, out=unsent)


def _as_it_is(compressor: ScaleComCompressor, slot: Slot, gradient: Tensor) -> Exchange:
    accumulated = slot.memory.compensate(slot.name, flat32(gradient))
    total: Tensor = yield Allreduce(accumulated, last=True)
    if max_abs(total) == math.inf:
        return None
    residual = slot.memory.residual(slot.name, accumulated.device)
    slot.memory.propose(slot.name, compressor._filtered(residual, torch.zeros_like(accumulated)))
    return Total(total)


def are_positions(positions: Tensor, k: int, numel: int) -> bool:
    """Whether int64 [k] ascends, without repetition, from at least 0 to less than `numel`."""
    if positions.shape != (k,):
        return False
    ends = not k or (int(positions[0]) >= 0 and int(positions[-1]) < numel)
    return ends and bool((positions[1:] > positions[:-1]).all())


def saves(numel: int, entries: int) -> bool:
    """Whether positions and values of so many entries are fewer bytes than all values are."""
    return _index_type(numel).itemsize * entries + 4 * (entries + 1) < 4 * numel


def _index_type(numel: int) -> torch.dtype:
    return torch.int32 if numel <= 1 << 31 else torch.int64
