"""What every rank of PowerSGD computes for itself, to the same bits: an orthonormal basis, a product of factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 1 << 16  # elements that stay in a processor's cache
_DEPENDENT = 1e-6  # of a column's norm, left when the columns before it are taken out: float32 noise


def orthonormalise(matrix: Tensor) -> Tensor:
    """The columns of float32 [n, r], r <= n, by Gram-Schmidt; a column that depends on those before it becomes zero.

    Every rank does this for itself: all steps are elementwise operations and running sums in float64, whose bits do not
    depend on the processor or its number of threads, as those of a matrix product do.
    """
    basis = torch.zeros(matrix.shape[::-1], dtype=torch.float64, device=matrix.device)
    for number, column in enumerate(matrix.t().to(torch.float64)):
        basis[number] = _direction(column, basis[:number])
    return basis.to(torch.float32).t().contiguous()


def _direction(column: Tensor, basis: Tensor) -> Tensor:
    """What `column`, [n], has beside the rows of `basis`, orthonormal [r, n], with norm 1; zeros if that is nothing."""
    largest = float(column.abs().max())
    if largest == 0:
        return torch.zeros_like(column)
    rest = column / largest  # its square must not underflow
    before = float(_sum(rest * rest, 0))
    for _ in range(2 if len(basis) else 0):  # once leaves rounding errors of the size of what was taken out
        rest = rest - _sum(basis * _sum(basis * rest, 1).unsqueeze(1), 0)
    after = float(_sum(rest * rest, 0))
    return rest / math.sqrt(after) if after > before * _DEPENDENT**2 else torch.zeros_like(column)


def _sum(values: Tensor, dimension: int) -> Tensor:
    """Added up one by one: `torch.sum` goes by the vector registers of the processor."""
    return values.cumsum(dimension).select(dimension, -1)


def product(left: Tensor, lines: Tensor, out: Tensor) -> None:
    """`out` = left @ lines, float32 [rows, rank] by [rank, columns], with the same bits on every rank."""
    rows, columns = out.shape
    step = max(_BLOCK // columns, 1) if left.device.type == "cpu" else rows
    for start in range(0, rows, step):
        block, factors = out[start : start + step], left[start : start + step]
        torch.mul(factors[:, :1], lines[0], out=block)
        for number in range(1, len(lines)):
            block += factors[:, number : number + 1] * lines[number]
