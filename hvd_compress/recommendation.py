"""Which method to begin with, by the optimizer: what docs/accuracy.md has measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .compressors import (
    BF16Compressor,
    Compressor,
    NoneCompressor,
    OneBitCompressor,
    QSGDCompressor,
    TopKCompressor,
)
from .step_check import is_of_adam

Accuracy = Literal["safe", "aggressive"]

_SAFE_BITS = 4


@dataclass(frozen=True)
class Recommendation:
    """A compressor, and why."""

    compressor: Compressor
    why: str


def recommend(optimizer: torch.optim.Optimizer, accuracy: Accuracy = "safe") -> Recommendation:
    """For the gradients of this optimizer. Raises ValueError for no such `accuracy`.

    safe: no loss of accuracy was seen, with any optimizer, on any model tried.
    aggressive: fewest bytes at a loss that most trainings can bear.
    """
    name = type(optimizer).__name__
    if accuracy == "safe":
        safe = _safe(optimizer)
        fewer = 32 / (_SAFE_BITS + 32 / safe.bucket_size)
        return Recommendation(safe, f"{fewer:.1f} times fewer bytes; no loss was seen with {name}")
    if accuracy != "aggressive":
        raise ValueError(f"accuracy must be 'safe' or 'aggressive': {accuracy!r}")
    if is_of_adam(optimizer):
        why = f"26 times fewer bytes; {name} learns slowly by sparse gradients, and better by signs"
        return Recommendation(OneBitCompressor(), f"{why}. hvd_compress.optim.OneBitAdam loses less")
    why = f"150 times fewer bytes; {name} lost some accuracy in short trainings, and none in longer ones"
    return Recommendation(TopKCompressor(density=0.01, value_bits=8), why)


def candidates(optimizer: torch.optim.Optimizer | None, accuracy: Accuracy = "safe") -> tuple[Compressor, ...]:
    """Among which to try for the fastest: the first sends gradients as they are. Raises ValueError as `recommend` does.

    Of the aggressive ones what suits any optimizer, and what suits this one, if it is known.
    """
    plain = NoneCompressor(), BF16Compressor()
    if accuracy == "safe":
        return *plain, _safe(optimizer)
    if accuracy != "aggressive":
        raise ValueError(f"accuracy must be 'safe' or 'aggressive': {accuracy!r}")
    if optimizer is None or is_of_adam(optimizer):
        return *plain, _safe(optimizer), OneBitCompressor()
    return *plain, _safe(optimizer), TopKCompressor(density=0.01, value_bits=8)


def _safe(optimizer: torch.optim.Optimizer | None) -> QSGDCompressor:
    """Adam, which the optimizer may be where it is not known, feels the error of larger buckets on a transformer."""
    return QSGDCompressor(bits=_SAFE_BITS, bucket_size=128 if optimizer is None or is_of_adam(optimizer) else 512)
