"""What optimizers have in common that move each parameter by its own gradient and moments."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class ByParameter(torch.optim.Optimizer, abc.ABC):
    """Makes a step of every parameter that has a gradient. more: options of a group besides.

    Raises ValueError for options that cannot work, and RuntimeError in a step with a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **more: Any,
    ) -> None:
        if not 0 <= float(lr) < math.inf:
            raise ValueError(f"lr must not be negative: {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1): {betas}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be positive: {eps}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative: {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    name = type(self).__name__
                    raise RuntimeError(f"{name} takes no sparse gradients: make the embedding with sparse=False")
                self._update(parameter, parameter.grad, group)
        return loss

    @abc.abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Move one parameter, without recording gradients."""
