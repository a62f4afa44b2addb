"""AC/DC: dense and sparse phases of training in turns (Peste et al., NeurIPS 2021, arXiv 2106.12379)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .masks import global_masks, uniform_masks
from .momentum import restart_momentum
from .pruned import PrunedTraining, prunable
from .schedule import Schedule


class ACDC(PrunedTraining):
    """Train `model` dense and compressed in turns, to a sparse model and its dense twin.

    As a compressed phase begins, the weights of largest magnitude are chosen; until it ends all others are zero, and so
    are their gradients. As a dense phase begins they return, from zero, and `optimizer` restarts its momentum.

    Call `begin` at the start of every epoch (or step, if the schedule counts those), between optimizer steps and, where
    several ranks train, once they all have the same weights: equal weights give equal masks.

    optimizer: of the model, before or after it is wrapped, as by DistributedOptimizer: weights are masked after the
        step() of any optimizer that trains some of them. Where training resumes, give the wrapped one, whose momentum
        may have to restart before its first step.
    sparsity: fraction of the prunable weights that are pruned, in (0, 1): exactly ceil(n * (1 - sparsity)) stay.
        Trained parameters with at least two dimensions are prunable: no biases, no normalisation.
    scope: "global" ranks the weights of all tensors together; "uniform" prunes each tensor alike, but leaves the first
        and the last dense.
    exclude: names or patterns of parameters that stay dense as well, such as "embedding.*".
    min_share: under "global", every tensor keeps at least this part, in [0, 1], of what it would keep if all were
        pruned alike, and at least one weight; 0 for no such floor, as in the paper.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule,
        sparsity: float = 0.9,
        scope: Literal["global", "uniform"] = "global",
        exclude: Sequence[str] = (),
        min_share: float = 0.1,
    ) -> None:
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity must be in (0, 1): {sparsity}")
        if scope not in ("global", "uniform"):
            raise ValueError(f"scope must be 'global' or 'uniform': {scope!r}")
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share must be in [0, 1]: {min_share}")
        self.schedule, self.sparsity, self.scope, self.min_share = schedule, sparsity, scope, min_share
        self.phase = 0
        self._dense_twin: dict[str, Any] | None = None
        super().__init__(model, optimizer, prunable(model, exclude, ends=scope == "global"))

    @property
    def compressed(self) -> bool:
        return self.phase % 2 == 1

    def begin(self, unit: int) -> None:
        """Say that epoch or step number `unit`, from 0, begins; enters its phase unless that is the present one.

        Raises ValueError when a phase was skipped, RuntimeError when pruned weights have come back to life.
        """
        phase = self.schedule.phase_at(unit)
        if self._enters(unit, "phase", phase, self.phase):
            self.phase = phase
            self._compress() if self.compressed else self._decompress()

    def dense_state_dict(self) -> dict[str, Any]:
        """The model's `state_dict()` as the last dense phase left it, on the CPU: after training, the dense twin."""
        if self._dense_twin is None:
            raise RuntimeError("no dense phase has ended yet: the model itself is the dense one")
        return dict(self._dense_twin)

    def state_dict(self) -> dict[str, Any]:
        """What is needed, beside the state of model and optimizer, to resume anywhere to the same bits."""
        twin = None if self._dense_twin is None else dict(self._dense_twin)
        return {"phase": self.phase, "masks": self._masks.state_dict(), "dense_twin": twin}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the masks do not fit the model, or the phase the schedule."""
        if not 0 <= state["phase"] < len(self.schedule.lengths):
            raise ValueError(f"the state is in phase {state['phase']}, the schedule has {len(self.schedule.lengths)}")
        self._load_masks(state["masks"])
        self.phase, self._dense_twin = state["phase"], state["dense_twin"]

    def _compress(self) -> None:
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        if self.scope == "uniform":
            masks = uniform_masks(weights, self.sparsity)
        else:
            masks = global_masks(weights, self.sparsity, min_share=self.min_share)
        self._dense_twin = {name: _copied(value) for name, value in self._model.state_dict().items()}
        self._prune(masks)

    def _decompress(self) -> None:
        self._prune({})
        for optimizer in self._optimizers:
            restart_momentum(optimizer)


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
