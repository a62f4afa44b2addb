"""QSGD: stochastic quantisation to a few bits (Alistarh et al., NeurIPS 2017, arXiv 1610.02132)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from ..kernels.quantise import levels_of
from ..memory import FRAMES
from ..schedules import Rate, describe
from .codec import Common, ScatterCodec
from .footprint import Sent
from .frames import dense_room, encode_dense, frame_room
from .gradients import flat, flat32, max_abs
from .slot import Slot

_NORMS = ("max", "l2")
_MOST_BITS = 8
_SECOND_ROUNDING = 1  # names another stream of random numbers


@dataclass(frozen=True)
class QSGDCompressor(ScatterCodec):
    """Unbiased, without state; `bits` an element, packed, and a float32 norm a bucket.

    bits: 1 to 8, or a schedule of it. A value is rounded at random to one of 2**(bits - 1) - 1 levels of its bucket's
        norm, with its sign; with one bit, to plus or minus the norm.
    bucket_size: elements that share a norm, a multiple of 8.
    norm: "max", the largest magnitude, the usual choice in practice; "l2", the Euclidean norm, as in the paper.
    """

    bits: Rate = 4
    bucket_size: int = 512
    norm: str = "max"

    algorithm = 7

    def __post_init__(self) -> None:
        _bits_at(self.bits, 0)
        if not isinstance(self.bucket_size, int) or self.bucket_size < 8 or self.bucket_size % 8:
            raise ValueError(f"bucket_size must be a positive multiple of 8: {self.bucket_size!r}")
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be 'max' or 'l2': {self.norm!r}")

    def rate_of(self, slot: Slot) -> int:
        """The bits of this step."""
        return _bits_at(self.bits if slot.rate is None else slot.rate, slot.step.number)

    def sent(self, slot: Slot) -> Sent:
        return Sent(gathered=self.payload_bytes(slot.parameter.shape, self.rate_of(slot)))

    def held(self, slot: Slot) -> dict[str, int]:
        numel, bits = slot.parameter.numel, self.rate_of(slot)
        saves = self._saves(numel, bits)
        return {FRAMES: frame_room(kernels.quantised_bytes(numel, bits, self.bucket_size)) if saves else 0}

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        values, bits, flags = flat(gradient), self.rate_of(slot), 0
        length = kernels.quantised_bytes(values.numel(), bits, self.bucket_size)
        if length <= dense_room(gradient):
            payload = self._encoded(values, bits, *slot.rounding(), slot.workspace.room(length))
        else:
            finite = kernels.of(values).largest(values) < math.inf
            payload, flags = encode_dense(flat32(gradient), gradient.dtype)[0] if finite else None, wire.DENSE
        return self.framed(slot, gradient, payload, rate=bits, flags=flags)

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).quantise_sum(payloads, self.rate_of(slot), self.bucket_size, divisor, out))

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return math.lcm(self.bucket_size, kernels.QUANTISED_BLOCK)

    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> list[Tensor | None]:
        values, bits = flat(gradient), self.rate_of(slot)
        key, opposite = slot.rounding()
        return [self._encoded(values[start:stop], bits, kernels.key_at(key, start), opposite) for start, stop in cuts]

    def moves_less(self, slot: Slot) -> bool:
        bits = self.rate_of(slot)
        return bits + _MOST_BITS < bits * slot.step.size

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        return kernels.quantised_bytes(numel, _MOST_BITS if back else self.rate_of(slot), self.bucket_size)

    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        """With the most bits, rounded at random once more: unbiased, too."""
        key = slot.random_key(_SECOND_ROUNDING)
        return self._encoded(total, _MOST_BITS, kernels.key_at(key, start))

    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).quantise_sum([payload], _MOST_BITS, self.bucket_size, divisor, out))

    def _encoded(
        self, values: Tensor, bits: int, key: int, opposite: bool = False, payload: Tensor | None = None
    ) -> Tensor | None:
        """Norms and codes, in `payload` or new memory; None for what is not finite."""
        if payload is None:
            payload = torch.empty(kernels.quantised_bytes(values.numel(), bits, self.bucket_size), dtype=torch.uint8)
        l2 = self.norm == "l2"
        length = kernels.of(values).quantise_encode(values, bits, self.bucket_size, l2, key, opposite, payload)
        return None if length == kernels.NOT_FINITE else payload

    def candidates(self, shape: torch.Size) -> tuple[float, ...]:
        """The bits that a controller may choose from for a gradient of `shape`; none if none saves."""
        return tuple(float(bits) for bits in range(1, _MOST_BITS + 1) if self._saves(shape.numel(), bits))

    def payload_bytes(self, shape: torch.Size, rate: float) -> int:
        """What a rank sends of a float32 gradient of `shape` at so many bits, its header included, exactly."""
        numel, bits = shape.numel(), _bits_at(rate, 0)
        saves = self._saves(numel, bits)
        return wire.frame_bytes(kernels.quantised_bytes(numel, bits, self.bucket_size) if saves else 4 * numel)

    def errors(self, gradient: Tensor, rates: Sequence[float]) -> list[float]:
        """Root of the expected squared L2 norm of gradient - C(gradient) at each of these bits.

        From the variance of the rounding, without a random number. A gradient that is not finite has infinite errors.
        """
        values = flat32(gradient)
        largest = max_abs(values)
        wanted = [_bits_at(rate, 0) for rate in rates]
        sent = [bits if self._saves(values.numel(), bits) else 0 for bits in wanted]
        if not any(sent) or not 0 < largest < math.inf:
            return [largest if largest == math.inf else 0.0] * len(sent)
        values = values / largest
        norms = self._norms(values)
        return [largest * math.sqrt(rounding_variance(values, norms, bits)) if bits else 0.0 for bits in sent]

    def _norms(self, values: Tensor) -> Tensor:
        """That of its bucket for each element, float32 [numel]."""
        buckets = torch.nn.functional.pad(values, (0, -values.numel() % self.bucket_size)).view(-1, self.bucket_size)
        norms = torch.linalg.vector_norm(buckets, 2 if self.norm == "l2" else math.inf, dim=1)
        return torch.repeat_interleave(norms, self.bucket_size)[: values.numel()]

    def _saves(self, numel: int, bits: int) -> bool:
        return wire.frame_bytes(kernels.quantised_bytes(numel, bits, self.bucket_size)) <= 4 * numel


def rounding_variance(values: Tensor, norms: Tensor, bits: int) -> float:
    """Expected squared error of `values`, float32 [numel], rounded at random to `bits` bits of `norms`, [numel].

    A value between two levels u apart, at the part f of the way, has the variance u**2 * f * (1 - f).
    """
    if bits == 1:  # the levels are -norm and norm
        return float((norms.square() - values.square()).clamp_(min=0).sum(dtype=torch.float64))
    units = (norms / levels_of(bits)).clamp_(min=torch.finfo(torch.float32).tiny)  # a bucket of zeros has no norm
    parts = (values.abs() / units).frac_()
    return float((units.square_() * parts * (1 - parts)).sum(dtype=torch.float64))


def _bits_at(rate: Rate, step: int) -> int:
    bits = rate(step) if callable(rate) else rate
    if bits not in range(1, _MOST_BITS + 1):
        raise ValueError(
            f"bits must be a whole number from 1 to {_MOST_BITS}: {describe(rate)} gives {bits!r} at {step}"
        )
    return int(bits)
