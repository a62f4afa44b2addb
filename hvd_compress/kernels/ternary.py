"""Ternary codes: stochastic ternarization and its 2-bit packing (0 is 0, 1 is +1, 2 is -1).

A block of 128 elements is 8 little-endian 32-bit words; element e of a block stands in word e % 8 at bit 2 * (e // 8),
so that 8 neighbours are decoded by one shift of 8 lanes. The last block is filled with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .random import RANDOM_BITS

_BLOCK = 128
_LANES = 8
_INVALID = torch.nan  # what the unused code 3 decodes to: loud, not silent


def ternary_bytes(numel: int) -> int:
    return -(-numel // _BLOCK) * _BLOCK // 4


def ternarize(gradient: Tensor, scaler: float, bits: Tensor) -> Tensor:
    """Codes of `gradient`, int32 [numel]: nonzero with probability |g| / scaler, hence scaler * code is unbiased.

    `bits`: int32 [numel], uniform in [0, 2**24); a code is nonzero where bits / 2**24 * scaler < |g|.
    """
    uniform = bits.to(torch.float32).mul_(2.0**-RANDOM_BITS).mul_(scaler)  # exact, then rounded once
    codes = torch.where(gradient < 0, 2, 1).to(torch.int32)
    return codes.mul_(uniform < gradient.abs())


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack codes, int32 [numel], into uint8 [ternary_bytes(numel)]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % _BLOCK))
    shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=codes.device)
    words = (padded.view(-1, _BLOCK // _LANES, _LANES) << shifts[:, None]).sum(1, dtype=torch.int32)
    return words.view(-1).view(torch.uint8)


def unpack_ternary(packed: Tensor, numel: int, scaler: float) -> Tensor:
    """Values scaler * {-1, 0, 1}, float32 [numel], of uint8 [ternary_bytes(numel)]."""
    shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=packed.device)
    codes = (packed.view(torch.int32).view(-1, 1, _LANES) >> shifts[:, None]).bitwise_and_(3)
    table = torch.tensor([0.0, scaler, -scaler, _INVALID], dtype=torch.float32, device=packed.device)
    return table[codes.view(-1)[:numel]]
