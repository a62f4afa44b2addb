"""What an algorithm is told of a gradient besides its values: whose it is, in which step, and what is kept for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import ErrorFeedback


@dataclass(frozen=True)
class Parameter:
    """One of the model's, as it was bound."""

    name: str
    index: int  # in the bound order, the same on every rank
    shape: torch.Size
    seed: int = 0
    compressed: bool = True  # neither too small, nor a vector, nor excluded
    tensor: Tensor | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class Step:
    """What all gradients of one step on one rank have in common."""

    number: int = 0  # exchanges finished so far, the same on every rank
    rank: int = 0
    size: int = 1
    loss_scale: float | None = None  # if it is known
    divisor: float = 1.0  # that sums may be divided by where this costs nothing; the same on every rank


class Workspace:
    """Memory for the frame of one gradient, kept from step to step."""

    def __init__(self) -> None:
        self.frame: Tensor | None = None  # the last one that was sent, uint8
        self._payload: Tensor | None = None  # the part of it that `room` gave

    def room(self, payload_bytes: int) -> Tensor:
        """Where in the next frame the payload goes, uint8 [payload_bytes]; what was there is lost."""
        if self.frame is None or self.frame.numel() < wire.frame_bytes(payload_bytes):
            self.frame, self._payload = torch.empty(wire.frame_bytes(payload_bytes), dtype=torch.uint8), None
        if self._payload is None or self._payload.numel() != payload_bytes:
            self._payload = self.frame[wire.HEADER_BYTES : wire.HEADER_BYTES + payload_bytes]
        return self._payload


@dataclass
class Slot:
    """One parameter's place in the exchange: what its gradients find there, and leave for the next step."""

    parameter: Parameter
    step: Step = Step()
    memory: ErrorFeedback = field(default_factory=ErrorFeedback)
    rate: float | None = None  # set by a controller, in place of the compressor's own
    cache: Any = None  # what the compressor would otherwise find out anew in every step
    workspace: Workspace = field(default_factory=Workspace)
    out: Tensor | None = None  # float32 [numel]: where the sum may go, in place of new memory

    @property
    def name(self) -> str:
        """Of the parameter, under which `memory` has its state."""
        return self.parameter.name

    def random_key(self, *purpose: int) -> int:
        """Of the random numbers of this gradient on this rank: no other has the same."""
        parameter, step = self.parameter, self.step
        return kernels.stream_key(parameter.seed, parameter.index, step.number, step.rank, *purpose)

    def rounding(self) -> tuple[int, bool]:
        """Key of the random numbers that this gradient is rounded by, and whether by their opposite.

        Ranks 2 i and 2 i + 1 have the same numbers: what they err by together has less variance than with numbers of
        their own, half of it where they round to equal levels (antithetic variates; see also Suresh et al., arXiv
        2203.04925).
        """
        parameter, step = self.parameter, self.step
        pair, second = divmod(step.rank, 2)
        return kernels.stream_key(parameter.seed, parameter.index, step.number, pair), second == 1

    def room_for_sum(self, gradient: Tensor) -> Tensor:
        """Float32 [numel], uninitialized: where the sum over the ranks goes."""
        if self.out is not None:
            return self.out
        return torch.empty(gradient.numel(), dtype=torch.float32, device=gradient.device)
