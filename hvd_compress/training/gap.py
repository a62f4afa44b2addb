"""Scheduled grow-and-prune: one part of a sparse model after the other is trained dense, and pruned back
(Ma et al., ICLR 2022, arXiv 2106.09857).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .masks import global_masks, uniform_masks
from .pruned import PrunedTraining, prunable


class GaP(PrunedTraining):
    """Cyclic grow-and-prune (C-GaP), to a sparse model whose weights all had their turn to grow.

    The prunable weights are cut into partitions of consecutive tensors. Training starts sparse but for the first
    partition, which is dense; after `units` it is pruned to the weights of largest magnitude, and the next one grows:
    its pruned weights come back, from zero. After `rounds` of all partitions the whole model is sparse, and stays so.

    With `Compression.masked(gap, ...)` the gradients of kept weights and of the partition that grows are all that
    travels.

    Call `begin` at the start of every epoch (or step, if `units` counts those), between optimizer steps and, where
    several ranks train, once they all have the same weights: equal weights give equal masks.

    optimizer: of the model, before or after it is wrapped.
    units: epochs or steps that a partition is dense for; at least 1.
    rounds: how often each partition grows; at least 1.
    partitions: how many there are, at least 2, of about as many weights each.
    sparsity: fraction of the weights of a partition that are pruned, in (0, 1). Trained parameters with at least two
        dimensions are prunable, no biases, no normalisation; but the first and the last one stay dense.
    scope: "uniform" prunes each tensor alike; "global" ranks those of a partition together, each of which keeps at
        least a tenth of what it would keep at uniform sparsity.
    exclude: names or patterns of parameters that stay dense, such as "embedding.*".

    The first masks are those of the largest initial weights; how the authors chose theirs was not at hand.
    Raises ValueError for options that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        units: int,
        rounds: int = 1,
        partitions: int = 4,
        sparsity: float = 0.8,
        scope: Literal["uniform", "global"] = "uniform",
        exclude: Sequence[str] = (),
    ) -> None:
        if units < 1 or rounds < 1:
            raise ValueError(f"units and rounds must be at least 1: {units}, {rounds}")
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity must be in (0, 1): {sparsity}")
        if scope not in ("uniform", "global"):
            raise ValueError(f"scope must be 'uniform' or 'global': {scope!r}")
        weights = prunable(model, exclude, ends=False)
        if not 2 <= partitions <= len(weights):
            raise ValueError(
                f"partitions must be from 2 to {len(weights)}, the number of prunable tensors: {partitions}"
            )
        super().__init__(model, optimizer, weights)
        self.units, self.rounds, self.sparsity, self.scope = units, rounds, sparsity, scope
        self.partitions = _cut(weights, partitions)
        self.stage = -1  # the partitions that have grown so far and were pruned back

    @property
    def grown(self) -> tuple[str, ...]:
        """The names of the parameters that are dense just now; empty once the whole model is sparse."""
        count = len(self.partitions)
        return self.partitions[self.stage % count] if 0 <= self.stage < self.rounds * count else ()

    def begin(self, unit: int) -> None:
        """Say that epoch or step number `unit`, from 0, begins; prunes and grows where it is time to.

        Raises ValueError when a turn was skipped, RuntimeError when pruned weights have come back to life.
        """
        if unit < 0:
            raise ValueError(f"epochs and steps count from 0: {unit}")
        stage = min(unit // self.units, self.rounds * len(self.partitions))
        if self._enters(unit, "turn", stage, self.stage):
            before, self.stage = self.grown if self.stage >= 0 else tuple(self._weights), stage
            masks = {**self.masks, **self._pruned(before)}
            self._prune({name: mask for name, mask in masks.items() if name not in self.grown})

    def state_dict(self) -> dict[str, Any]:
        """What is needed, beside the state of model and optimizer, to resume anywhere to the same bits."""
        return {"stage": self.stage, "masks": self._masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the masks do not fit the model, or the turn the schedule."""
        if not -1 <= state["stage"] <= self.rounds * len(self.partitions):
            raise ValueError(f"the state is in turn {state['stage']}, of {self.rounds * len(self.partitions)} here")
        self._load_masks(state["masks"])
        self.stage = state["stage"]

    def _pruned(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The masks of the largest magnitudes, partition by partition."""
        masks: dict[str, Tensor] = {}
        for partition in self.partitions:
            weights = {name: self._weights[name].detach() for name in partition if name in names}
            if weights and self.scope == "uniform":
                masks |= uniform_masks(weights, self.sparsity)
            elif weights:
                masks |= global_masks(weights, self.sparsity, min_share=0.1)
        return masks


def _cut(weights: Mapping[str, Tensor], count: int) -> tuple[tuple[str, ...], ...]:
    """Consecutive names in `count` groups, none empty, of about as many weights each."""
    names = list(weights)
    totals = list(itertools.accumulate(weight.numel() for weight in weights.values()))
    ends, start = [], 0
    for part in range(1, count):
        wanted = totals[-1] * part / count
        choices = range(start + 1, len(names) - (count - part) + 1)
        start = min(choices, key=lambda end: abs(totals[end - 1] - wanted))
        ends.append(start)
    return tuple(tuple(names[a:b]) for a, b in zip([0, *ends], [*ends, len(names)]))
