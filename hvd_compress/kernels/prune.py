"""Small elements become zero or the threshold, at random and unbiased (Ye et al., ECCV 2020, arXiv 1908.00173)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .random import RANDOM_BITS, random_bits
from .ternary import pack_ternary, ternarize, ternary_bytes, unpack_ternary

_AS_IT_IS = 3  # the ternary code of an element that is not below the threshold


def prune_dense(gradient: Tensor, threshold: float, key: int) -> tuple[Tensor, float, int]:
    """Prune the elements of `gradient`, floating point of any shape, that are smaller than `threshold`.

    An element below it becomes sign(g) * threshold with probability |g| / threshold, else 0; the random bits of element
    i in row-major order are those of the stream `key`. All others stay, NaN and infinity among them; a threshold of 0
    changes nothing. The threshold is rounded to float32 and to the type of the gradient.

    Returns the pruned tensor (the gradient itself if nothing can change), the sum of |g| before pruning in float64,
    added up in any order, and how many elements were below the threshold.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be finite and at least 0: {threshold}")
    total = float(gradient.abs().sum(dtype=torch.float64))
    threshold = _representable(threshold, gradient.dtype)
    if threshold == 0 or gradient.numel() == 0:
        return gradient, total, 0
    bits = random_bits(gradient.numel(), key, gradient.device)
    pruned, below = prune_by_bits(gradient, threshold, bits.view(gradient.shape))
    return pruned, total, below


def prune_by_bits(gradient: Tensor, threshold: float, bits: Tensor) -> tuple[Tensor, int]:
    """The pruned gradient and how many elements were below the threshold, which its type must be able to hold.

    `bits`: int32, of the shape of the gradient, uniform in [0, 2**24); an element below the threshold survives where
    bits / 2**24 * threshold < |g|.
    """
    uniform = bits.to(torch.float32).mul_(2.0**-RANDOM_BITS).mul_(threshold)  # exact, then rounded once
    magnitude = gradient.abs().to(torch.float32)
    below = magnitude < threshold
    raised = torch.copysign(gradient.new_full((), threshold), gradient).mul_(uniform < magnitude)
    return torch.where(below, raised, gradient), int(below.sum())


def pruned_entries(payload_bytes: int, numel: int) -> int:
    """How many elements a payload of this length sends as they are."""
    return (payload_bytes - 4 - ternary_bytes(numel)) // 4


def encode_pruned(gradient: Tensor, threshold: float, bits: Tensor) -> tuple[Tensor, int]:
    """The payload, uint8, of what `prune_by_bits` makes of float32 [numel], finite; and how many were below.

    Layout, little-endian: the threshold, float32; ternary blocks (kernels/ternary.py), where code 3 says that the
    element is sent as it is; then these elements, float32.
    """
    limit = torch.tensor([threshold], dtype=torch.float32, device=gradient.device)
    exact = (gradient.abs() >= limit) & (gradient != 0)
    codes = ternarize(gradient, float(limit), bits).masked_fill_(exact, _AS_IT_IS)
    parts = (limit.view(torch.uint8), pack_ternary(codes), gradient[exact].view(torch.uint8))
    return torch.cat(parts).cpu(), gradient.numel() - (parts[2].numel() // 4)


def decode_pruned(payload: Tensor, numel: int) -> Tensor:
    """float32 [numel] of what `encode_pruned` wrote. Raises ValueError if the bytes do not fit."""
    start = 4 + ternary_bytes(numel)
    if payload.numel() < start or payload.numel() % 4:
        raise ValueError(f"{payload.numel()} bytes do not hold {start} and whole elements")
    payload = payload.clone()  # float32 needs 4-byte alignment
    threshold = float(payload[:4].view(torch.float32))
    if not 0 <= threshold < math.inf:
        raise ValueError(f"a threshold of {threshold}")
    values = unpack_ternary(payload[4:start], numel, threshold)
    exact = values.isnan()
    if payload.numel() != start + 4 * int(exact.sum()):
        raise ValueError(f"{payload.numel()} bytes do not hold the {int(exact.sum())} elements that are announced")
    values[exact] = payload[start:].view(torch.float32)
    return values


def _representable(threshold: float, dtype: torch.dtype) -> float:
    """A value that survivors can really take: any other would be rounded there, and no longer be right on average."""
    for kind in (torch.float32, dtype):
        threshold = float(torch.tensor(min(threshold, torch.finfo(kind).max), dtype=kind))
    return threshold
