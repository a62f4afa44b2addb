"""PowerSGD: low-rank gradients by power iteration (Vogels et al., NeurIPS 2019, arXiv 1905.13727).

Both factors are plain sums over the ranks: traffic does not grow with their number, and needs no frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..kernels.random import RANDOM_BITS
from ..memory import FACTOR, FACTORS, RESIDUALS, SPARE, key
from ..requests import Allreduce, Exchange, Total
from ..schedules import Rate, value_at
from .base import Compressor
from .footprint import Sent
from .gradients import flat, flat32, max_abs
from .slot import Slot

_MIN_RATIO = 2  # of dense bytes to sent ones: what saves less travels as it is
_LARGEST = 2.0**125  # so that twice a norm is finite in float32


@dataclass(frozen=True)
class PowerSGDCompressor(Compressor):
    """Sends 4 * r * (rows + columns) bytes of a gradient, its first dimension by all others, and error feedback.

    approximation_rank: r, at least 1, or a schedule of it; never more than the rows or columns. A tensor that this
        would not halve travels as float32 as it is, as vectors do.

    With M_i = residual + gradient of rank i: P = sum of M_i Q, made orthonormal; Q_i = M_i^T P; the total is P times
    the sum of Q_i^T. That sum is the Q of the next step (warm start). The residual is M_i - P Q_i^T: summed over the
    ranks this is the same as with the mean of all Q_i in place of the rank's own, as in the authors' first code; but it
    is a projection, never larger than M_i. Gradients past about 4e37 / sqrt(numel) count as not finite.
    """

    approximation_rank: Rate = 4

    algorithm = 8
    slow_with_adam: ClassVar[bool] = True
    stateful = True

    def __post_init__(self) -> None:
        _whole(value_at(self.approximation_rank, 0))

    def rate_of(self, slot: Slot) -> float:
        """The approximation rank of this step, before it is cut to the rows or columns."""
        return value_at(self.approximation_rank if slot.rate is None else slot.rate, slot.step.number)

    def sent(self, slot: Slot) -> Sent:
        return Sent(reduced=self.payload_bytes(slot.parameter.shape, self.rate_of(slot)))

    def held(self, slot: Slot) -> dict[str, int]:
        residual = 4 * slot.parameter.numel
        factor = 4 * rank_of(slot.parameter.shape, self.rate_of(slot)) * matrix_shape(slot.parameter.shape)[1]
        return {RESIDUALS: residual, FACTORS: factor, SPARE: residual + factor}

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        rank = rank_of(gradient.shape, self.rate_of(slot))
        if not rank:
            return (yield from _as_it_is(slot, gradient))
        values, (rows, columns) = flat(gradient), matrix_shape(gradient.shape)
        kernel = kernels.of(values)
        kept, residual = slot.memory.room(slot.name, values), slot.memory.residual(slot.name, values.device)
        left = kept.new_empty(rows, rank)
        start = starting_factor(slot, columns, rank).t().to(kept.device)
        largest = kernel.project(values, residual, kept, start, left)
        if not largest * math.sqrt(kept.numel()) < _LARGEST:
            left.fill_(math.nan)  # so that every rank sees it in the sum, whatever this product has made of it
        left = yield Allreduce(left)
        if max_abs(left) == math.inf:
            return None
        left = kernels.orthonormalise(left)
        mine = kept.new_empty(rank, columns)
        kernel.backproject(kept, left, mine)
        factor: Tensor = yield Allreduce(mine, last=True)
        if max_abs(factor) == math.inf:
            return None
        out, divisor = slot.room_for_sum(kept), slot.step.divisor
        bound = kernel.rebuild(kept, left, mine, factor.contiguous(), divisor, out)
        slot.memory.propose(slot.name, kept)
        slot.memory.propose(key(slot.name, FACTOR), factor.t().contiguous())
        return Total(out, divisor, bound)

    def candidates(self, shape: torch.Size) -> tuple[float, ...]:
        """The ranks that a controller may choose from for a gradient of `shape`: powers of two; none if none saves."""
        powers = [1 << exponent for exponent in range(max(min(matrix_shape(shape)), 1).bit_length())]
        return tuple(float(power) for power in powers if rank_of(shape, power))

    def payload_bytes(self, shape: torch.Size, rate: float) -> int:
        """What a rank sends of a gradient of `shape` at approximation rank `rate`, exactly."""
        rank = rank_of(shape, rate)
        return 4 * (rank * sum(matrix_shape(shape)) if rank else shape.numel())

    def messages(self, shape: torch.Size, rate: float) -> int:
        """One for each factor."""
        return 2 if rank_of(shape, rate) else 1

    def errors(self, gradient: Tensor, rates: Sequence[float]) -> list[float]:
        """Frobenius norm of gradient - C(gradient) at each of these approximation ranks, of a warm start.

        From one subspace of the largest of them, by one and a half power iterations from a fixed start. A gradient that
        is not finite has infinite errors.
        """
        ranks = [rank_of(gradient.shape, rate) for rate in rates]
        largest = max_abs(flat32(gradient))
        if not any(ranks) or not 0 < largest < math.inf:
            return [largest if largest == math.inf else 0.0] * len(ranks)
        matrix = flat32(gradient).view(matrix_shape(gradient.shape)) / largest
        rest, tails = _spectrum(matrix, max(ranks))
        return [largest * math.sqrt(rest + tails[rank]) if rank else 0.0 for rank in ranks]


def _as_it_is(slot: Slot, gradient: Tensor) -> Exchange:
    accumulated = slot.memory.compensate(slot.name, flat32(gradient))
    total: Tensor = yield Allreduce(accumulated, last=True)
    if max_abs(total) == math.inf:
        return None
    slot.memory.propose(slot.name, torch.zeros_like(accumulated))
    return Total(total)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """First dimension by all others; a vector is a column."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def rank_of(shape: torch.Size, rate: float) -> int:
    """The approximation rank of a gradient of `shape` where `rate` is asked for; 0 where it travels as it is."""
    rows, columns = matrix_shape(shape)
    rank = min(_whole(rate), rows, columns)
    return rank if _MIN_RATIO * rank * (rows + columns) <= rows * columns else 0


def starting_factor(slot: Slot, columns: int, rank: int) -> Tensor:
    """Q, float32 [columns, rank], of columns no longer than 1: that of the last step, as far as it goes.

    The other columns are random directions, the same on every rank; so are those that the last step has left at zero,
    since its gradient had no such rank: otherwise they would stay at zero for ever.
    """
    parameter = slot.parameter
    kept = slot.memory.residuals.get(key(slot.name, FACTOR))
    start = torch.zeros(rank, columns) if kept is None else kept.new_zeros(rank, columns)
    if kept is not None and len(kept) == columns:
        start[: kept.shape[1]] = kept.t()[:rank]
    largest = start.abs().amax(1)
    for column, top in enumerate(largest.tolist()):
        if top == 0:
            start[column] = random_direction(columns, kernels.stream_key(parameter.seed, parameter.index, column))
            largest[column] = 1
    return start.div_(largest.unsqueeze(1)).div_(math.sqrt(columns)).t()


def random_direction(numel: int, key: int) -> Tensor:
    """Uniform in (-1, 1), float64 [numel], on the CPU."""
    half = 1 << (RANDOM_BITS - 1)
    return (kernels.random_bits(numel, key).to(torch.float64) + (0.5 - half)) / half


def _spectrum(matrix: Tensor, rank: int) -> tuple[float, list[float]]:
    """Of float32 [rows, columns] and a subspace of `rank` that it nearly spans: the squared norm of what is outside,
    and of what is inside but for its r largest singular values, for r from 0 to `rank`."""
    right = torch.stack([random_direction(matrix.shape[1], kernels.stream_key(number)) for number in range(rank)], 1)
    left = kernels.orthonormalise(matrix @ right.to(matrix.device, torch.float32))
    left = kernels.orthonormalise(matrix @ kernels.orthonormalise((left.t() @ matrix).t()))
    inside = left.t() @ matrix
    outside = torch.linalg.vector_norm(torch.addmm(matrix, left, inside, alpha=-1), dtype=torch.float64)
    squares = (torch.linalg.svdvals(inside.to(torch.float64)) ** 2).tolist()
    return float(outside) ** 2, [math.fsum(squares[number:]) for number in range(rank + 1)]


def _whole(rate: float) -> int:
    if not rate >= 1 or rate != int(rate):
        raise ValueError(f"approximation_rank must be a whole number, at least 1: {rate}")
    return int(rate)
