"""Codes of b bits between the smallest and the largest value of a block, as ActNN stores activations.

Chen et al., ICML 2021, arXiv 2104.14129, section 3: of a block of 256 values from low to high, a value v becomes the
code (v - low) / unit, stochastically rounded, with unit = (high - low) / (2**b - 1); its expectation is v. Layout: low
and unit of each block, float32; then the codes, packed as in quantise.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantise import QUANTISED_BLOCK, pack_codes, unpack_codes
from .random import RANDOM_BITS

_RANGE_BYTES = 8


def affine_bytes(numel: int, bits: int) -> int:
    return -(-numel // QUANTISED_BLOCK) * (_RANGE_BYTES + QUANTISED_BLOCK * bits // 8)


def ranges_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest value and the difference between the largest and it, float32 [blocks] each, of float32 [numel]."""
    count = -(-values.numel() // QUANTISED_BLOCK)
    last = values[-1:].expand(count * QUANTISED_BLOCK - values.numel())
    blocks = torch.cat([values, last]).view(count, QUANTISED_BLOCK)
    low = blocks.amin(1) + 0.0  # no negative zero
    return low, blocks.amax(1) - low


def pack_affine(values: Tensor, low: Tensor, span: Tensor, bits: int, random: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges and codes, uint8 each, of float32 [numel]; stochastically rounded by `random`, int32 in [0, 2**24)."""
    most = float((1 << bits) - 1)
    factor = most / span
    flat = (span == 0) | torch.isinf(factor)
    unit, factor = torch.where(flat, 0.0, span / most), torch.where(flat, 0.0, factor)

    def of_elements(per_block: Tensor) -> Tensor:
        return torch.repeat_interleave(per_block, QUANTISED_BLOCK)[: values.numel()]

    place = (values - of_elements(low)) * of_elements(factor) + random.to(torch.float32).mul_(2.0**-RANDOM_BITS)
    codes = place.clamp_(max=most).to(torch.int32)
    return torch.stack([low, unit], 1).view(-1).view(torch.uint8), pack_codes(codes, bits)


def unpack_affine(payload: Tensor, numel: int, bits: int) -> Tensor:
    """Values, float32 [numel]."""
    blocks = -(-numel // QUANTISED_BLOCK)
    ranges = payload[: blocks * _RANGE_BYTES].clone().view(torch.float32).view(-1, 2)
    codes = unpack_codes(payload[blocks * _RANGE_BYTES :], blocks * QUANTISED_BLOCK, bits).view(blocks, QUANTISED_BLOCK)
    return (ranges[:, :1] + codes.to(torch.float32) * ranges[:, 1:]).view(-1)[:numel]
