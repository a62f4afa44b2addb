"""What topologies share: the gradients that they exchange, and what is common to all ranks before these are encoded."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compressors import Slot
from ..compressors.codec import Codec, Common
from ..requests import Allreduce, ReduceOp, Request
from .regions import Span


@dataclass(frozen=True)
class Part:
    """One gradient, and the place of its parameter."""

    slot: Slot
    gradient: Tensor
    span: Span = Span(0, 0, 0)  # its place in its bucket


def agreed(codec: Codec, parts: Sequence[Part]) -> Generator[Request, Any, list[Common | None]]:
    """What `codec.frame` is to know of each, by one MAX for all of them where the codec asks for anything."""
    mine = [codec.common(part.slot, part.gradient) for part in parts]
    if mine[0] is None:
        return [None] * len(parts)
    own = [value or 0.0 for value in mine]
    largest = yield from largest_of_all(own)
    return [Common(value, most) for value, most in zip(own, largest)]


def largest_of_all(mine: Sequence[float]) -> Generator[Request, Any, list[float]]:
    """The largest on any rank of each of these, as float32."""
    largest: Tensor = yield Allreduce(torch.tensor(mine, dtype=torch.float32), ReduceOp.MAX)
    return largest.tolist()
