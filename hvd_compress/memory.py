"""Error feedback: what was not sent yet, per parameter, and when it may change. Knows no algorithm and no transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class ErrorFeedback:
    """Residuals by parameter name, float32 [numel], in units of the loss-scaled gradient of this rank.

    A new residual is only *proposed* by an exchange. It takes effect at `commit`, when the whole step is known to be
    finite on every rank; `discard` leaves every residual as it was.
    """

    def __init__(self) -> None:
        self.residuals: dict[str, Tensor] = {}
        self._proposed: dict[str, Tensor] = {}

    def compensate(self, name: str, gradient: Tensor) -> Tensor:
        """Return gradient + residual, a new tensor; `gradient` is float32 [numel]."""
        residual = self.residuals.get(name)
        return gradient.clone() if residual is None else gradient + residual.to(gradient.device)

    def propose(self, name: str, residual: Tensor) -> None:
        self._proposed[name] = residual

    def commit(self) -> None:
        self.residuals.update(self._proposed)
        self._proposed.clear()

    def discard(self) -> None:
        self._proposed.clear()

    def rescale(self, factor: float) -> None:
        """Multiply all residuals, as when the loss scale changes."""
        if factor == 1:
            return
        for residual in self.residuals.values():
            residual.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        return {name: residual.detach().cpu().clone() for name, residual in self.residuals.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._proposed.clear()
        self.residuals = {name: residual.detach().to(torch.float32).clone() for name, residual in state.items()}


def share(
    residuals: Mapping[int, Mapping[str, Tensor]], saved_size: int, rank: int, size: int, resize: str
) -> dict[str, Tensor]:
    """What rank `rank` of `size` takes over of `residuals`, by rank, that `saved_size` ranks had.

    With as many ranks as before, its own. Else, for resize="sum", an equal share of the sum of all; for "reset", none.
    Raises ValueError when residuals are needed that are not there.
    """
    if size == saved_size and rank in residuals:
        return dict(residuals[rank])
    if resize == "reset":
        return {}
    if missing := sorted(set(range(saved_size)) - residuals.keys()):
        raise ValueError(
            f"the state lacks the residuals of ranks {missing} of {saved_size}, needed at rank {rank} of {size}: save "
            "what gather_state_dict() returns, or load with resize='reset'"
        )
    names = sorted({name for mine in residuals.values() for name in mine})
    ranks = sorted(residuals)
    return {
        name: torch.stack([residuals[r][name] for r in ranks if name in residuals[r]]).sum(0) / size for name in names
    }
