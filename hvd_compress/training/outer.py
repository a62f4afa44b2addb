"""What becomes of the mean of the ranks' moves, where each makes many steps of its own in between."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

Moments = dict[str, Tensor]  # of one parameter, the same on every rank


@dataclass(frozen=True)
class Outer(abc.ABC):
    """A rule for the outer step. `decay` multiplies what error feedback has kept, before each exchange."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive: {self.lr}")

    @property
    def decay(self) -> float:
        return 1.0

    @abc.abstractmethod
    def move(self, mean: Tensor, moments: Moments) -> Tensor:
        """What is added to a parameter, given the mean over the ranks of where their steps have led; both [shape]."""


@dataclass(frozen=True)
class Averaging(Outer):
    """Local SGD (Stich, 2019, arXiv 1805.09767): at `lr` 1 the parameters become the mean of the ranks'."""

    def move(self, mean: Tensor, moments: Moments) -> Tensor:
        return self.lr * mean


@dataclass(frozen=True)
class Nesterov(Outer):
    """DiLoCo (Douillard et al., 2023, arXiv 2311.08105): SGD with Nesterov momentum, the mean in the gradient's place.

    b = momentum * b + mean
    move = lr * (mean + momentum * b)
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1): {self.momentum}")

    def move(self, mean: Tensor, moments: Moments) -> Tensor:
        if "momentum" not in moments:
            moments["momentum"] = torch.zeros_like(mean)
        momentum = moments["momentum"].mul_(self.momentum).add_(mean)
        return self.lr * (mean + self.momentum * momentum)


@dataclass(frozen=True)
class SparseLoCo(Outer):
    """SparseLoCo (Sarfi et al., 2025, arXiv 2508.15706): each rank's error feedback, which decays, is the momentum.

    With e what a rank has not sent yet, and C its compression:

        e = beta * e + delta
        send C(e), and keep e - C(e)
        move = lr * mean of what was sent

    For a compression with error feedback. The paper's sends 64 of 4096 elements, of 2 bits each.
    """

    beta: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1]: {self.beta}")

    @property
    def decay(self) -> float:
        return self.beta

    def move(self, mean: Tensor, moments: Moments) -> Tensor:
        return self.lr * mean
