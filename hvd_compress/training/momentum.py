"""What an optimizer forgets when pruned weights return (AC/DC, arXiv 2106.12379)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def restart_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zero, in place and for every parameter, the momentum that was gathered while weights were pruned.

    `momentum_buffer` (SGD, RMSprop) is zeroed alone. An optimizer with `exp_avg` (Adam, AdamW, NAdam, ...) starts anew
    altogether, `exp_avg_sq` and `step` included: pruned weights had no gradients, so that their second moment has
    decayed to nearly 0, and a `step` that stays large would no longer correct for that. With betas of 0.9 and 0.999 the
    returning weights would move by up to 6.6 times the learning rate, against once from a new start.
    """
    for state in optimizer.state.values():
        if "exp_avg" in state:
            _start_anew(state)
        elif isinstance(state.get("momentum_buffer"), Tensor):
            state["momentum_buffer"].zero_()


def _start_anew(state: dict[str, Any]) -> None:
    for name, value in state.items():
        start = 1 if name == "mu_product" else 0  # NAdam's product over all steps so far
        if isinstance(value, Tensor):
            value.fill_(start)
        elif isinstance(value, (int, float)):
            state[name] = start
