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
from .adacomp import adacomp_choice
from .affine import affine_bytes, pack_affine, ranges_of, unpack_affine
from .codec import NOT_FINITE, TOO_LARGE, PayloadError
from .counts import count_bits, count_bytes
from .gaps import decode_gaps, encode_gaps, token_width
from .lowrank import orthonormalise, product
from .narrow import pack_narrow, unpack_narrow
from .positions import pack_positions, unpack_positions
from .prune import decode_pruned, encode_pruned, prune_dense
from .quantise import (
    bucket_means,
    bucket_norms,
    dequantise,
    divisible,
    pack_codes,
    quantise,
    quantised_bytes,
    unpack_codes,
)
from .random import OPPOSITE, random_bits
from .sparse import pack_sparse, sparse_bytes, unpack_sparse
from .ternary import pack_ternary, ternarize, ternary_bytes, unpack_ternary
from .topk import chunk_largest, topk_indices

__all__ = [
    "accumulate",
    "adacomp_encode",
    "affine_decode",
    "affine_encode",
    "backproject",
    "bfloat_encode",
    "bfloat_sum",
    "chunk_largest",
    "counts_decode",
    "counts_encode",
    "crc32",
    "gaps_sum",
    "largest",
    "magnitudes",
    "moments",
    "momentum",
    "narrow_decode",
    "narrow_encode",
    "narrow_sum",
    "orthonormalise",
    "positions_decode",
    "positions_encode",
    "project",
    "prune_dense",
    "prune_encode",
    "prune_sum",
    "quantise_encode",
    "quantise_sum",
    "rebuild",
    "sign_encode",
    "sparse_positions",
    "sparse_sum",
    "ternary_encode",
    "ternary_sum",
    "threshold_encode",
    "topk_encode",
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


def magnitudes(gradient: Tensor) -> tuple[float, float]:
    """Largest |value|, as of `largest`, and their mean where that is finite; 0 for an empty tensor."""
    top = largest(gradient)
    return top, _moments.mean_magnitude(gradient) if 0 < top < math.inf else 0.0


def ternary_encode(gradient: Tensor, bound: float, scaler: float, key: int, opposite: bool, payload: Tensor) -> int:
    """TernGrad: the scaler, then a ternary code of each value, clipped to +-`bound`."""
    clipped = gradient.to(torch.float32).clamp(-bound, bound)
    random = random_bits(clipped.numel(), key, clipped.device, opposite)
    random ^= torch.signbit(clipped) * OPPOSITE  # rounds up
    codes = ternarize(clipped, scaler, random)
    return _put(payload, _float(scaler), pack_ternary(codes))


def ternary_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    """Where all scalers are the same, codes are added, which is exact, and their sum is scaled."""
    heads = [payload[: _FLOAT.size] for payload in payloads]
    same = bool(heads) and heads[0].numel() == _FLOAT.size and all(torch.equal(head, heads[0]) for head in heads)
    scale = _scale(heads[0]) if same else None

    def decode(payload: Tensor) -> Tensor:
        _expect(payload, _FLOAT.size + ternary_bytes(out.numel()))
        return unpack_ternary(payload[_FLOAT.size :], out.numel(), _scale(payload) if scale is None else 1.0)

    return _sum(payloads, divisor, out, decode, 1.0 if scale is None else scale)


def quantise_encode(
    gradient: Tensor, bits: int, bucket_size: int, l2: bool, key: int, opposite: bool, payload: Tensor
) -> int:
    """QSGD: a norm a bucket (Euclidean, or the largest magnitude), and stochastically rounded codes of `bits` bits."""
    values = gradient.to(torch.float32)
    if not largest(values) < math.inf:
        return NOT_FINITE
    norms = divisible(bucket_norms(values, bucket_size, l2), bits)
    random = random_bits(values.numel(), key, values.device, opposite)
    codes = quantise(values, norms, bits, bucket_size, random)
    return _put(payload, norms.view(torch.uint8), pack_codes(codes, bits))


def quantise_sum(payloads: Sequence[Tensor], bits: int, bucket_size: int, divisor: float, out: Tensor) -> float:
    norm_bytes = 4 * -(-out.numel() // bucket_size)

    def decode(payload: Tensor) -> Tensor:
        _expect(payload, quantised_bytes(out.numel(), bits, bucket_size))
        norms = payload[:norm_bytes].clone().view(torch.float32)
        return dequantise(unpack_codes(payload[norm_bytes:], out.numel(), bits), norms, bits, bucket_size)

    return _sum(payloads, divisor, out, decode)


def affine_encode(values: Tensor, bits: int, key: int, payload: Tensor) -> int:
    """Codes of `bits` bits between the smallest and the largest value of each block, as affine.py lays them out.

    NOT_FINITE also where a value is finite, but the difference of two of a block is not.
    """
    values = values.to(torch.float32)
    if not largest(values) < math.inf:
        return NOT_FINITE
    low, span = ranges_of(values)
    if not largest(span) < math.inf:
        return NOT_FINITE
    return _put(payload, *pack_affine(values, low, span, bits, random_bits(values.numel(), key, values.device)))


def affine_decode(payload: Tensor, bits: int, out: Tensor) -> None:
    """Fill `out`, float32 [numel], with what `payload` says of it."""
    _expect(payload, affine_bytes(out.numel(), bits))
    out.copy_(unpack_affine(payload, out.numel(), bits))


def sign_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, bucket_size: int, payload: Tensor) -> int:
    """The mean magnitude of each bucket of residual + gradient, and an element's sign, laid out as QSGD of one bit.

    `kept`, float32 [numel], becomes residual + gradient, less what these say. `bucket_size`: a multiple of 256.
    """
    if not accumulate(gradient, residual, kept) < math.inf:
        return NOT_FINITE
    means = bucket_means(kept, bucket_size)
    positive = ~torch.signbit(kept)
    kept -= torch.copysign(torch.repeat_interleave(means, bucket_size)[: kept.numel()], kept)
    return _put(payload, means.view(torch.uint8), pack_codes(positive.to(torch.int32), 1))


def counts_encode(totals: Tensor, most: int, payload: Tensor) -> int:
    """Whole numbers from -most to most, float32 [numel]."""
    return _put(payload, pack_codes(totals.to(torch.int32) + most, count_bits(most)))


def counts_decode(payload: Tensor, most: int, scaler: float, divisor: float, out: Tensor) -> float:
    """`out` = number * scaler / divisor; NaN for a code past the largest."""

    def decode(packed: Tensor) -> Tensor:
        _expect(packed, count_bytes(out.numel(), most))
        codes = unpack_codes(packed, out.numel(), count_bits(most))
        return torch.where(codes > 2 * most, math.nan, (codes - most).to(torch.float32))

    return _sum([payload], divisor, out, decode, scaler)


def accumulate(gradient: Tensor, residual: Tensor | None, kept: Tensor) -> float:
    """`kept` = residual + gradient; returns its largest magnitude. `residual` and `kept`: float32 [numel], apart."""
    kept.copy_(gradient)
    if residual is not None:
        kept += residual
    return largest(kept)


def momentum(gradient: Tensor, velocity: Tensor | None, factor: float, nesterov: bool, out: Tensor) -> None:
    """`out` = factor * velocity + gradient; by Nesterov, factor * (velocity + gradient). None stands for zeros."""
    before = torch.zeros_like(out) if velocity is None else velocity
    if nesterov:
        torch.add(before, gradient, out=out).mul_(factor)
    else:
        torch.mul(before, factor, out=out).add_(gradient)


def project(gradient: Tensor, residual: Tensor | None, kept: Tensor, lines: Tensor, left: Tensor) -> float:
    """As `accumulate`; and `left`, [rows, rank], becomes `kept` as [rows, columns] @ lines.t(), of [rank, columns]."""
    top = accumulate(gradient, residual, kept)
    torch.mm(kept.view(len(left), -1), lines.t(), out=left)
    return top


def backproject(kept: Tensor, left: Tensor, lines: Tensor) -> None:
    """`lines` = left.t() @ kept, in the shapes of `project`."""
    torch.mm(left.t(), kept.view(len(left), -1), out=lines)


def rebuild(kept: Tensor, left: Tensor, mine: Tensor, lines: Tensor, divisor: float, out: Tensor) -> float:
    """`out` = left @ lines / divisor, with the same bits on every rank, and `kept` -= left @ mine, in place.

    Returns the largest |out|. `out` and `kept`: float32 [rows * columns], apart; `left` [rows, rank]; `mine` and
    `lines` [rank, columns].
    """
    kept.view(len(left), -1).addmm_(left, mine, alpha=-1)
    product(left, lines, out.view(len(left), -1))
    if divisor != 1:
        out /= divisor
    return largest(out)


def topk_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, k: int, payload: Tensor) -> int:
    """The `k` largest of what has accumulated, of equals the first; `kept` becomes the rest."""
    if not accumulate(gradient, residual, kept) < math.inf:
        return NOT_FINITE
    return _put_entries(kept, topk_indices(kept, k), payload)


def threshold_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, threshold: float, payload: Tensor) -> int:
    """All of what has accumulated that is at least `threshold` > 0; `kept` becomes the rest.

    Returns TOO_LARGE where that does not fit in `payload`; `kept` is all that has accumulated then.
    """
    if not accumulate(gradient, residual, kept) < math.inf:
        return NOT_FINITE
    positions = torch.nonzero(kept.abs() >= threshold).view(-1)
    if sparse_bytes(kept.numel(), positions.numel()) > payload.numel():
        return TOO_LARGE
    return _put_entries(kept, positions, payload)


def sparse_positions(payload: Tensor, numel: int) -> Tensor:
    """The positions in a payload, int64 [entries]. Raises ValueError for one that makes no sense."""
    return unpack_sparse(payload, numel)[1]


def _put_entries(kept: Tensor, positions: Tensor, payload: Tensor) -> int:
    length = _put(payload, pack_sparse(kept[positions], positions, kept.numel()))
    kept[positions] = 0
    return length


def sparse_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    def decode(payload: Tensor) -> Tensor:
        values, positions = unpack_sparse(payload, out.numel())
        return _dense(out, positions, values)

    return _sum(payloads, divisor, out, decode)


def positions_encode(positions: Tensor, numel: int) -> Tensor:
    """As kernels.positions.pack_positions."""
    return pack_positions(positions, numel)


def positions_decode(packed: Tensor, numel: int, entries: int) -> Tensor:
    """As kernels.positions.unpack_positions."""
    return unpack_positions(packed, numel, entries)


def narrow_encode(exact: Tensor, numel: int, bits: int, kept: Tensor) -> Tensor:
    """The narrow payload of the entries of an exact one; to `kept`, float32 [numel], which they were taken from, goes
    what rounding leaves of each."""
    values, positions = (part.to(kept.device) for part in unpack_sparse(exact, numel))
    payload, read = pack_narrow(values, positions, numel, bits)
    kept[positions] += values - read
    return payload


def narrow_decode(payload: Tensor, numel: int, bits: int) -> tuple[Tensor, Tensor]:
    """As kernels.narrow.unpack_narrow."""
    return unpack_narrow(payload, numel, bits)


def narrow_sum(payloads: Sequence[Tensor], bits: int, divisor: float, out: Tensor) -> float:
    def decode(payload: Tensor) -> Tensor:
        values, positions = unpack_narrow(payload, out.numel(), bits)
        return _dense(out, positions, values)

    return _sum(payloads, divisor, out, decode)


def adacomp_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, bin_size: int, payload: Tensor) -> int:
    """AdaComp: a scale, and gap codes of what each bin sends; `kept` becomes what has accumulated, less that.

    Returns TOO_LARGE where that does not fit in `payload`; `kept` is all that has accumulated then.
    """
    if not accumulate(gradient, residual, kept) < math.inf:
        return NOT_FINITE
    positions, negative, scale = adacomp_choice(kept, gradient.to(torch.float32), bin_size)
    gaps = encode_gaps(positions, negative, token_width(bin_size))
    if _FLOAT.size + gaps.numel() > payload.numel():
        return TOO_LARGE
    kept[positions] -= torch.where(negative, -scale, scale)
    return _put(payload, _float(scale), gaps)


def gaps_sum(payloads: Sequence[Tensor], width: int, divisor: float, out: Tensor) -> float:
    def decode(payload: Tensor) -> Tensor:
        gaps = payload[_FLOAT.size :]
        if payload.numel() < _FLOAT.size or gaps.numel() % (width // 8):
            raise ValueError(f"{payload.numel()} bytes are no whole number of {width}-bit tokens after a scale")
        scale = _scale(payload)
        positions, negative = decode_gaps(gaps.clone(), width)
        if positions.numel() and int(positions[-1]) >= out.numel():
            raise ValueError(f"position {int(positions[-1])} is past the end")
        return _dense(out, positions, torch.where(negative, -scale, scale))

    return _sum(payloads, divisor, out, decode)


def _dense(like: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    dense = torch.zeros_like(like)
    dense[positions.to(like.device)] = values.to(like.device, like.dtype)
    return dense


def bfloat_encode(gradient: Tensor, payload: Tensor) -> int:
    """The nearest bfloat16 of each value, ties to even."""
    rounded = gradient.to(torch.bfloat16)
    return _put(payload, rounded.view(torch.uint8)) if largest(rounded) < math.inf else NOT_FINITE


def bfloat_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    def decode(payload: Tensor) -> Tensor:
        _expect(payload, 2 * out.numel())
        return payload.clone().view(torch.bfloat16).to(torch.float32)

    return _sum(payloads, divisor, out, decode)


def prune_encode(gradient: Tensor, threshold: float, key: int, payload: Tensor) -> int:
    """The stochastically pruned gradient, see kernels.prune. Returns TOO_LARGE where that does not fit in `payload`."""
    values = gradient.to(torch.float32)
    if not largest(values) < math.inf:
        return NOT_FINITE
    encoded, _ = encode_pruned(values, threshold, random_bits(values.numel(), key, values.device))
    return TOO_LARGE if encoded.numel() > payload.numel() else _put(payload, encoded)


def prune_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    return _sum(payloads, divisor, out, lambda payload: decode_pruned(payload, out.numel()))


def _sum(
    payloads: Sequence[Tensor],
    divisor: float,
    out: Tensor,
    decode: Callable[[Tensor], Tensor],
    scale: float = 1.0,
) -> float:
    out.zero_()
    for rank, payload in enumerate(payloads):
        try:
            out += decode(payload).to(out.device)
        except ValueError as error:
            raise PayloadError(rank, str(error)) from error
    if scale != 1:
        out *= scale
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
