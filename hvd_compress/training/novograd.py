"""NovoGrad, an optimizer for gradients that are sparse or coarse: its second moment is one number a parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .by_parameter import ByParameter


class NovoGrad(ByParameter):
    """NovoGrad (Ginsburg et al., 2019, arXiv 1905.11286): momentum of gradients that are normalised by layer.

    With g the gradient of a parameter, a tensor of any shape, and w the parameter:

        v = second * v + (1 - second) * |g|^2, and |g|^2 in the first step
        m = first * m + g / (sqrt(v) + eps) + weight_decay * w
        w = w - lr * m

    Adam divides each element by what this element has seen, which is little where few elements are sent; here all
    elements of a parameter are divided by the norm of what was received, which error feedback keeps at its size.

    params: as of any optimizer.
    lr: its steps have a norm of about lr / (1 - first), whatever the gradient's. The paper's are 0.01 and larger.
    betas: first and second; the paper's are 0.95 and 0.98.
    grad_averaging: multiply what is added to m by 1 - first, the paper's variant with a moving average.

    A gradient that is 0 in all elements moves nothing but by momentum and weight decay.
    Raises ValueError for options that cannot work, RuntimeError for a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, grad_averaging=grad_averaging)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        first, second = group["betas"]
        state = self.state[parameter]
        square = torch.linalg.vector_norm(gradient).square()
        if not state:
            state["exp_avg_sq"] = square
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        else:
            state["exp_avg_sq"].lerp_(square, 1 - second)
        added = gradient / (state["exp_avg_sq"].sqrt() + group["eps"])
        if group["weight_decay"]:
            added.add_(parameter, alpha=group["weight_decay"])
        share = 1 - first if group["grad_averaging"] else 1.0
        state["exp_avg"].mul_(first).add_(added, alpha=share)
        parameter.sub_(state["exp_avg"] * group["lr"])
