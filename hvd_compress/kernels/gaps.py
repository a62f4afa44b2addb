"""Gap codes: sorted positions with a sign each, one token an element where the gaps are short.

A token of w bits (8 or 16) is a sign in its top bit and, below, the number of elements skipped since the previous one.
The largest skip, L = 2**(w-1) - 1, is reserved: with sign 0 it skips L elements and marks none, with sign 1 it skips
L * (L + 1). So runs of empty bins cost next to nothing, and no bin needs a count.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOKEN = {8: torch.uint8, 16: torch.int16}  # torch lacks many operations on uint16; the bits are the same


def token_width(bin_size: int) -> int:
    """Bits of the tokens for bins of that many elements."""
    return 8 if bin_size <= 64 else 16


def encode_gaps(positions: Tensor, negative: Tensor, width: int) -> Tensor:
    """Tokens of `width` bits, uint8 [bytes], of ascending `positions`, int64 [n], with signs `negative`, bool [n]."""
    limit = (1 << (width - 1)) - 1
    skips = torch.diff(positions, prepend=positions.new_full((1,), -1)) - 1
    far, rest = skips // (limit * (limit + 1)), skips % (limit * (limit + 1))
    near, last = rest // limit, rest % limit
    marks = torch.cumsum(far + near + 1, 0) - 1  # where each element's own token goes, after its skips
    tokens = torch.full(
        (int(marks[-1]) + 1 if marks.numel() else 0,), limit, dtype=torch.int64, device=positions.device
    )
    far_start = marks - far - near
    far_tokens = torch.repeat_interleave(far_start, far) + _within(far)
    tokens[far_tokens] = limit | (limit + 1)
    tokens[marks] = last + negative * (limit + 1)
    return _narrow(tokens, width)


def decode_gaps(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Ascending positions, int64 [n], and signs, bool [n], of the tokens in uint8 [bytes]."""
    limit = (1 << (width - 1)) - 1
    tokens = packed.view(_TOKEN[width]).to(torch.int64).bitwise_and_(2 * limit + 1)
    skips, signs = tokens & limit, tokens > limit
    marks = skips != limit
    steps = torch.where(marks, skips + 1, torch.where(signs, limit * (limit + 1), limit))
    return torch.cumsum(steps, 0)[marks] - 1, signs[marks]


def _within(counts: Tensor) -> Tensor:
    """0, 1, ..., count - 1 for every count in turn."""
    total = torch.cumsum(counts, 0)
    return torch.arange(int(total[-1]) if total.numel() else 0, device=counts.device) - torch.repeat_interleave(
        total - counts, counts
    )


def _narrow(tokens: Tensor, width: int) -> Tensor:
    if width == 16:
        tokens = torch.where(tokens >= 1 << 15, tokens - (1 << 16), tokens)
    return tokens.to(_TOKEN[width]).view(torch.uint8)
