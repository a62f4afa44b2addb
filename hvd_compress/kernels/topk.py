"""Exact top-k by magnitude, the same set on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_indices(values: Tensor, k: int) -> Tensor:
    """Ascending positions, int64 [k], of the k largest |values|; of equals the lower position is taken."""
    if k < 1:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    if k >= values.numel():
        return torch.arange(values.numel(), device=values.device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    magnitudes = values.abs()
    threshold = torch.topk(magnitudes, k, sorted=False).values.min()
    chosen = magnitudes > threshold
    ties = torch.nonzero(magnitudes == threshold).view(-1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return torch.nonzero(chosen).view(-1)


def chunk_largest(values: Tensor, chunk: int) -> Tensor:
    """Position of the largest |value| of each `chunk` elements, of equals the first: int64; `values` finite [numel]."""
    chunks = -(-values.numel() // chunk)
    magnitudes = torch.nn.functional.pad(values.abs(), (0, chunks * chunk - values.numel()), value=-1.0)
    return magnitudes.view(chunks, chunk).argmax(1) + torch.arange(chunks, device=values.device) * chunk
