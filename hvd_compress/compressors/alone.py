"""What one rank's exchange loses of its gradient: the exchange is made once more, with nobody, and leaves no trace."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..memory import ErrorFeedback
from ..requests import Allgather, Allreduce, Alltoall, Broadcast, Exchange, Request, Total
from .base import Compressor
from .slot import Slot


def relative_error(compressor: Compressor, slot: Slot, gradient: Tensor) -> float:
    """L2 norm of what would not be sent of what is owed, as a part of that; NaN if not all is finite.

    As if this rank were the only one: random numbers are those of rank 0, scalers and choices of entries its own.
    """
    memory = ErrorFeedback()
    memory.residuals = dict(slot.memory.residuals)
    step = dataclasses.replace(slot.step, rank=0, size=1, divisor=1.0)
    alone = Slot(slot.parameter, step, memory, slot.rate)
    owed = compressor.owed(alone, gradient)
    total = _alone(compressor.exchange(alone, gradient))
    if total is None:
        return math.nan
    whole = float(torch.linalg.vector_norm(owed, dtype=torch.float64))
    lost = float(torch.linalg.vector_norm(owed - total.values.view(-1), dtype=torch.float64))
    return lost / whole if whole else 0.0


def _alone(exchange: Exchange) -> Total | None:
    answer: Any = None
    try:
        while True:
            answer = _answer(exchange.send(answer))
    except StopIteration as end:
        total: Total | None = end.value
        return total


def _answer(request: Request) -> Any:
    if isinstance(request, Allgather):
        return [request.frame]
    if isinstance(request, Alltoall):
        return list(request.frames)
    assert isinstance(request, (Allreduce, Broadcast))  # an exchange of one gradient asks for nothing else
    return request.tensor
