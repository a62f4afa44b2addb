"""Weights where the next step will find them: SpecTrain's prediction (Chen et al., 2018, arXiv 1809.02839).

Gradients that are applied one step late are those of weights which have moved on by then. Most of that move is known
beforehand: it is what momentum does.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def predicted_weights(optimizer: torch.optim.Optimizer) -> Generator[None, None, None]:
    """For forward and backward: the weights are where the optimizer's momentum takes them in the next step.

    They are back, to the bit, when the block ends; gradients stay. Of SGD with momentum w - lr momentum v, of Adam,
    AdamW and other optimizers with `exp_avg` w - lr m / (sqrt(s) + eps), with what the next step leaves of the first
    moment m, both moments corrected for their bias, and weights not decayed. Before the first step, and without a
    momentum, nothing moves.

    It holds a copy of the weights while it lasts. Raises ValueError for an optimizer with states of another kind.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                move = _move(optimizer, group, optimizer.state.get(parameter, {}))
                if move is not None:
                    before.append((parameter, parameter.detach().clone()))
                    parameter.detach().sub_(move)
        yield
    finally:
        for parameter, weights in before:
            parameter.detach().copy_(weights)


def _move(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | None:
    """What the next step subtracts from a parameter, but for the part of its gradient; None for nothing."""
    if (velocity := state.get("momentum_buffer")) is not None:
        return float(group["lr"]) * group["momentum"] * velocity
    if "exp_avg" in state and state["exp_avg"].shape == getattr(state.get("exp_avg_sq"), "shape", None):
        (beta1, beta2), step = group["betas"], float(state.get("step", 1))
        first = beta1 * state["exp_avg"] / (1 - beta1 ** (step + 1))
        second = state["exp_avg_sq"] / (1 - beta2**step)
        move: Tensor = float(group["lr"]) * first / (second.sqrt() + group.get("eps", 0.0))
        return move
    if any(isinstance(value, Tensor) and value.dim() for value in state.values()):
        raise ValueError(
            f"what {type(optimizer).__name__} does next cannot be told from its state, {', '.join(map(str, state))}: "
            "this knows momentum_buffer, as of SGD, and exp_avg with exp_avg_sq, as of Adam"
        )
    return None
