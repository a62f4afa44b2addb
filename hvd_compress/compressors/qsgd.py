"""QSGD: stochastic quantisation to a few bits (Alistarh et al., NeurIPS 2017, arXiv 1610.02132)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from ..requests import Exchange
from .base import Compressor, Slot, encode_dense, fits, flat, flat32, gather_sum

_NORMS = ("max", "l2")


@dataclass(frozen=True)
class QSGDCompressor(Compressor):
    """Unbiased, without state; `bits` an element, packed, and a float32 norm a bucket.

    bits: 1 to 8. A value is rounded at random to one of 2**(bits - 1) - 1 levels of its bucket's norm, with its sign;
        with one bit, to plus or minus the norm.
    bucket_size: elements that share a norm, a multiple of 8.
    norm: "max", the largest magnitude, the usual choice in practice; "l2", the Euclidean norm, as in the paper.
    """

    bits: int = 4
    bucket_size: int = 512
    norm: str = "max"

    algorithm = 7

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"bits must be a whole number from 1 to 8: {self.bits!r}")
        if not isinstance(self.bucket_size, int) or self.bucket_size < 8 or self.bucket_size % 8:
            raise ValueError(f"bucket_size must be a positive multiple of 8: {self.bucket_size!r}")
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be 'max' or 'l2': {self.norm!r}")

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        values = flat(gradient)
        kernel, flags = kernels.of(values), 0
        payload = torch.empty(kernels.quantised_bytes(values.numel(), self.bits, self.bucket_size), dtype=torch.uint8)
        if fits(payload, gradient):
            key = kernels.stream_key(slot.seed, slot.index, slot.step, slot.rank)
            length = kernel.quantise_encode(values, self.bits, self.bucket_size, self.norm == "l2", key, payload)
            finite = length != kernels.NOT_FINITE
        else:
            payload, flags = encode_dense(flat32(gradient), gradient.dtype)[0], wire.DENSE
            finite = kernel.largest(values) < math.inf
        return (
            yield from gather_sum(
                self, slot, gradient, payload if finite else None, add=self._add, rate=self.bits, flags=flags
            )
        )

    def _add(self, payloads: Sequence[Tensor], out: Tensor) -> None:
        kernels.of(out).quantise_sum(payloads, self.bits, self.bucket_size, 1.0, out)
