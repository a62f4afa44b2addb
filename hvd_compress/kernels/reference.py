"""The hot loops as torch operations: on every device, and the measure of the C++ ones, which write the same bytes.

Tensors are flat. Gradients are float32, float16 or bfloat16 [numel], sums float32 [numel], payloads uint8 on the CPU.
`*_encode` write a payload and return its length in bytes, or NOT_FINITE. `*_sum` put the sum of what all ranks sent,
added in rank order and divided by `divisor`, into `out`, and return a bound of its magnitudes, which is finite exactly
if they are; they raise PayloadError for a payload that does not fit.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import moments as _moments
from .codec import NOT_FINITE, PayloadError
from .prune import prune_dense
from .quantise import (
    bucket_norms,
    dequantise,
    divisible,
    pack_codes,
    quantise,
    quantised_bytes,
    unpack_codes,
)
from .random import random_bits
from .ternary import pack_ternary, ternarize, ternary_bytes, unpack_ternary

__all__ = [
    "bfloat_encode",
    "bfloat_sum",
    "crc32",
    "largest",
    "moments",
    "prune_dense",
    "quantise_encode",
    "quantise_sum",
    "ternary_encode",
    "ternary_sum",
]

_FLOAT = struct.Struct("<f")


def crc32(header: bytes, payload: Tensor) -> int:
    """CRC-32 (IEEE) of `header` and `payload`."""
    return zlib.crc32(payload.numpy().data, zlib.crc32(header))


def largest(gradient: Tensor) -> float:
    """Largest |value|; infinity when any is not finite, 0 for an empty tensor."""
    return _moments.largest_magnitude(gradient)


def moments(gradient: Tensor) -> tuple[float, float]:
    """Largest |value|, as of `largest`, and the population standard deviation where that is positive and finite."""
    top = largest(gradient)
    return top, _moments.standard_deviation(gradient) if 0 < top < math.inf else 0.0


def ternary_encode(gradient: Tensor, bound: float, scaler: float, key: int, payload: Tensor) -> int:
    """TernGrad: the scaler, then a ternary code of each value, clipped to +-`bound`."""
    clipped = gradient.to(torch.float32).clamp(-bound, bound)
    codes = ternarize(clipped, scaler, random_bits(clipped.numel(), key, clipped.device))
    return _put(payload, _float(scaler), pack_ternary(codes))


def ternary_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    def decode(payload: Tensor) -> Tensor:
        _expect(payload, _FLOAT.size + ternary_bytes(out.numel()))
        return unpack_ternary(payload[_FLOAT.size :], out.numel(), _scale(payload))

    return _sum(payloads, divisor, out, decode)


def quantise_encode(gradient: Tensor, bits: int, bucket_size: int, l2: bool, key: int, payload: Tensor) -> int:
    """QSGD: a norm a bucket (Euclidean, or the largest magnitude), and stochastically rounded codes of `bits` bits."""
    values = gradient.to(torch.float32)
    if not largest(values) < math.inf:
        return NOT_FINITE
    norms = divisible(bucket_norms(values, bucket_size, l2), bits)
    codes = quantise(values, norms, bits, bucket_size, random_bits(values.numel(), key, values.device))
    return _put(payload, norms.view(torch.uint8), pack_codes(codes, bits))


def quantise_sum(payloads: Sequence[Tensor], bits: int, bucket_size: int, divisor: float, out: Tensor) -> float:
    norm_bytes = 4 * -(-out.numel() // bucket_size)

    def decode(payload: Tensor) -> Tensor:
        _expect(payload, quantised_bytes(out.numel(), bits, bucket_size))
        norms = payload[:norm_bytes].clone().view(torch.float32)
        return dequantise(unpack_codes(payload[norm_bytes:], out.numel(), bits), norms, bits, bucket_size)

    return _sum(payloads, divisor, out, decode)


def bfloat_encode(gradient: Tensor, payload: Tensor) -> int:
    """The nearest bfloat16 of each value, ties to even."""
    rounded = gradient.to(torch.bfloat16)
    return _put(payload, rounded.view(torch.uint8)) if largest(rounded) < math.inf else NOT_FINITE


def bfloat_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    def decode(payload: Tensor) -> Tensor:
        _expect(payload, 2 * out.numel())
        return payload.clone().view(torch.bfloat16).to(torch.float32)

    return _sum(payloads, divisor, out, decode)


def _sum(payloads: Sequence[Tensor], divisor: float, out: Tensor, decode: Callable[[Tensor], Tensor]) -> float:
    out.zero_()
    for rank, payload in enumerate(payloads):
        try:
            out += decode(payload).to(out.device)
        except ValueError as error:
            raise PayloadError(rank, str(error)) from error
    if divisor != 1:
        out /= divisor
    return largest(out)


def _put(payload: Tensor, *parts: Tensor) -> int:
    length = 0
    for part in parts:
        payload[length : length + part.numel()] = part.cpu()
        length += part.numel()
    return length


def _expect(payload: Tensor, length: int) -> None:
    if payload.numel() != length:
        raise ValueError(f"{payload.numel()} bytes instead of {length}")


def _float(value: float) -> Tensor:
    return torch.frombuffer(bytearray(_FLOAT.pack(value)), dtype=torch.uint8)


def _scale(payload: Tensor) -> float:
    return float(_FLOAT.unpack(payload[: _FLOAT.size].numpy().tobytes())[0])
