"""Codes of b bits with one norm a bucket (QSGD), and their packing.

A value v in a bucket of norm m is level * m / s with s = 2**(b-1) - 1 and -s <= level <= s; its code is level + s. With
one bit it is +m or -m, code 1 or 0. Layout: the norms, float32, one a bucket; then for each block of 256 elements 8 * b
little-endian 32-bit words: element e of a block stands in the stream of lane e % 8, at bit (e // 8) * b; word w of a
lane's stream is word 8 * w + lane of the block.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .random import RANDOM_BITS

QUANTISED_BLOCK, _LANES = 256, 8
_ROWS = QUANTISED_BLOCK // _LANES


def levels_of(bits: int) -> int:
    """Levels above zero; with one bit there is only the sign."""
    return 1 if bits == 1 else (1 << (bits - 1)) - 1


def quantised_bytes(numel: int, bits: int, bucket_size: int) -> int:
    return 4 * -(-numel // bucket_size) + -(-numel // QUANTISED_BLOCK) * QUANTISED_BLOCK * bits // 8


def bucket_norms(values: Tensor, bucket_size: int, l2: bool) -> Tensor:
    """float32 [buckets] of finite float32 [numel]; at most the largest float32, which no value exceeds."""
    if values.numel() == 0:
        return values.new_empty(0)
    padded = torch.nn.functional.pad(values, (0, -values.numel() % bucket_size)).view(-1, bucket_size)
    if not l2:
        return padded.abs().amax(1)
    total = _sums(padded.to(torch.float64).square())
    return total.sqrt().to(torch.float32).clamp_(max=torch.finfo(torch.float32).max).to(values.device)


def bucket_means(values: Tensor, bucket_size: int) -> Tensor:
    """Mean magnitudes, float32 [buckets], of finite float32 [numel]."""
    if values.numel() == 0:
        return values.new_empty(0)
    padded = torch.nn.functional.pad(values, (0, -values.numel() % bucket_size)).view(-1, bucket_size)
    counts = torch.full((len(padded),), float(bucket_size), dtype=torch.float64)
    counts[-1] -= padded.numel() - values.numel()
    return (_sums(padded.to(torch.float64).abs()) / counts).to(torch.float32).to(values.device)


def _sums(rows: Tensor) -> Tensor:
    """Of float64 [buckets, bucket_size], row after row in eight lanes and these by halves, as the kernels add."""
    lanes = torch.from_numpy(np.add.accumulate(rows.view(len(rows), -1, _LANES).cpu().numpy(), axis=1)[:, -1].copy())
    for half in (4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    return lanes[:, 0]


def quantise(values: Tensor, norms: Tensor, bits: int, bucket_size: int, random: Tensor) -> Tensor:
    """Codes, int32 [numel], of float32 [numel]; by `random`, int32 in [0, 2**24), rounded up or down.

    Norms too small to be divided by must be zero.
    """
    levels = levels_of(bits)
    factors = torch.where(norms > 0, levels / norms, 0.0)
    factor = torch.repeat_interleave(factors, bucket_size)[: values.numel()]
    uniform = random.to(torch.float32).mul_(2.0**-RANDOM_BITS)
    if bits == 1:
        return (uniform < (values * factor + 1) * 0.5).to(torch.int32)
    level = values * factor
    whole = level.floor()
    return (whole.to(torch.int32) + (uniform < level - whole) + levels).clamp_(0, 2 * levels)


def divisible(norms: Tensor, bits: int) -> Tensor:
    """`norms`, but zero where levels / norm would overflow."""
    return torch.where(torch.isinf(levels_of(bits) / norms), 0.0, norms)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, int32 [numel], into uint8 [256 * bits / 8 a block]."""
    padded = (
        torch.nn.functional.pad(codes, (0, -codes.numel() % QUANTISED_BLOCK)).view(-1, _ROWS, _LANES).to(torch.int64)
    )
    words = torch.zeros(len(padded), bits, _LANES, dtype=torch.int64, device=codes.device)
    for row in range(_ROWS):
        word, offset = divmod(row * bits, 32)
        shifted = padded[:, row] << offset
        words[:, word] |= shifted & 0xFFFFFFFF
        if offset + bits > 32:
            words[:, word + 1] |= shifted >> 32
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.view(-1).view(torch.uint8)


def unpack_codes(packed: Tensor, numel: int, bits: int) -> Tensor:
    """Codes, int64 [numel], of uint8."""
    words = packed.clone().view(torch.int32).to(torch.int64).bitwise_and_(0xFFFFFFFF).view(-1, bits, _LANES)
    rows = []
    for row in range(_ROWS):
        word, offset = divmod(row * bits, 32)
        value = words[:, word] >> offset
        if offset + bits > 32:
            value = value | words[:, word + 1] << (32 - offset)
        rows.append(value & ((1 << bits) - 1))
    return torch.stack(rows, 1).view(-1)[:numel]


def dequantise(codes: Tensor, norms: Tensor, bits: int, bucket_size: int) -> Tensor:
    """Values, float32 [numel], of codes, int64 [numel]; NaN for a code that `quantise` never gives."""
    levels = levels_of(bits)
    unit = torch.repeat_interleave(norms / levels, bucket_size)[: codes.numel()]
    if bits == 1:
        return (2 * codes - 1).to(torch.float32) * unit
    values = (codes - levels).to(torch.float32) * unit
    return torch.where(codes > 2 * levels, math.nan, values)
