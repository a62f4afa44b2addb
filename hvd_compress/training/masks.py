"""Which weights are kept, by parameter name, and the one-shot magnitude masks of AC/DC (arXiv 2106.12379)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import topk_indices


class Masks:
    """Masks of any pruning method: `masks`, by parameter name, and the `version` that tells when they changed.

    named_masks: bool, of the shape of the parameter, True where a weight is kept. Parameters without one are dense.
    """

    def __init__(self, named_masks: Mapping[str, Tensor] | None = None) -> None:
        self._masks = _checked(named_masks or {})
        self._version = 0

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Read-only: `update` replaces them."""
        return MappingProxyType(self._masks)

    @property
    def version(self) -> int:
        """Grows by one at each `update`."""
        return self._version

    def update(self, named_masks: Mapping[str, Tensor]) -> None:
        """Replace all masks. Where several ranks train, on every rank, between the same two steps."""
        self._masks = _checked(named_masks)
        self._version += 1

    def digest(self) -> str:
        """SHA-256 of names, shapes and masks, in hexadecimal: equal on ranks that keep the same weights."""
        digest = hashlib.sha256()
        for name, mask in sorted(self._masks.items()):
            digest.update(repr((name, tuple(mask.shape))).encode())
            digest.update(np.packbits(mask.cpu().numpy()).tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"version": self._version, "masks": {name: mask.cpu().clone() for name, mask in self._masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._masks, self._version = _checked(state["masks"]), int(state["version"])


def _checked(named_masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, mask in named_masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name!r} must be a bool tensor, True where a weight is kept")
    return dict(named_masks)


def kept(numel: int, sparsity: float) -> int:
    """ceil(numel * (1 - sparsity)), of the decimal fraction as written: 10 weights at 0.7 keep 3, in floats 4."""
    return math.ceil(numel * (1 - _decimal(sparsity)))


def uniform_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep exactly `kept(numel, sparsity)` largest magnitudes of every tensor; of equals the lower index stays."""
    return {
        name: _mask(topk_indices(magnitudes(name, weight), kept(weight.numel(), sparsity)), weight)
        for name, weight in weights.items()
    }


def global_masks(weights: Mapping[str, Tensor], sparsity: float, *, min_share: float = 0.0) -> dict[str, Tensor]:
    """Keep exactly `kept(numel of all, sparsity)` largest magnitudes of all tensors together.

    Of equals the earlier tensor, then the lower index, stays. Every tensor keeps at least min_share, in [0, 1], of what
    it would keep at uniform sparsity, and the others that much less.
    """
    sizes = [weight.numel() for weight in weights.values()]
    share = _decimal(min_share) * (1 - _decimal(sparsity))
    reserved = [max(math.floor(size * share), 1) if min_share else 0 for size in sizes]
    total = kept(sum(sizes), sparsity)
    if sum(reserved) > total:
        raise ValueError(
            f"sparsity={sparsity} keeps {total} of all weights, too few for {len(sizes)} tensors: lower it"
        )
    flat = [magnitudes(name, weight) for name, weight in weights.items()]
    for mine, least in zip(flat, reserved):
        if least:
            mine[topk_indices(mine, least)] = math.inf  # chosen before all others
    together = torch.cat([mine.to(flat[0].device) for mine in flat])
    chosen = torch.zeros(sum(sizes), dtype=torch.bool, device=together.device)
    chosen[topk_indices(together, total)] = True
    return {
        name: mine.view(weight.shape).to(weight.device).clone()
        for (name, weight), mine in zip(weights.items(), chosen.split(sizes))
    }


def magnitudes(name: str, weight: Tensor) -> Tensor:
    """|weight|, a new tensor [numel]. Raises ValueError if one is not finite: there is no largest among those."""
    flat = weight.detach().reshape(-1)
    flat = flat.abs() if flat.dtype == torch.float64 else flat.to(torch.float32).abs()
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(f"the weights {name!r} are not finite: training has diverged; lower the learning rate")
    return flat


def _mask(indices: Tensor, weight: Tensor) -> Tensor:
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[indices] = True
    return mask.view(weight.shape)


def _decimal(fraction: float) -> Fraction:
    return Fraction(str(fraction))
