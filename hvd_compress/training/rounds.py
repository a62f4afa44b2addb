"""What ranks that train by themselves have in common, and when they exchange which part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .outer import Moments, Outer


class Shared:
    """The parameters from which all ranks have gone on, theta, float32 or finer, and the moments of the outer step."""

    def __init__(self, parameters: Sequence[Tensor], outer: Outer) -> None:
        self.parameters = [parameter.to(_exact(parameter.dtype), copy=True) for parameter in parameters]
        self.outer = outer
        self._moments: list[Moments] = [{} for _ in self.parameters]

    def delta(self, index: int, mine: Tensor) -> Tensor:
        """Where the steps of this rank have led from theta: theta_i - theta, [shape]."""
        theta = self.parameters[index]
        return mine.to(theta.dtype) - theta

    def move(self, index: int, mean: Tensor) -> Tensor:
        """Make the outer step by the mean of the ranks' deltas; returns the new theta."""
        theta = self.parameters[index]
        theta += self.outer.move(mean, self._moments[index])
        return theta

    def hash(self) -> str:
        """Of the bits of theta."""
        return hash_of(*map(_bytes, self.parameters))

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """A copy."""
        return {
            "shared": {name: theta.cpu().clone() for name, theta in zip(names, self.parameters)},
            "moments": {
                name: {kind: moment.cpu().clone() for kind, moment in moments.items()}
                for name, moments in zip(names, self._moments)
            },
        }

    def check(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Raise ValueError for a state of other parameters."""
        shapes = {name: theta.shape for name, theta in zip(names, self.parameters)}
        if {name: theta.shape for name, theta in state["shared"].items()} != shapes:
            raise ValueError("the state is of other parameters: load it with the same model")

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        for name, theta, moments in zip(names, self.parameters, self._moments):
            theta.copy_(state["shared"][name])
            moments.clear()
            moments.update({kind: moment.to(theta, copy=True) for kind, moment in state["moments"][name].items()})


class Rounds:
    """When which parameters are exchanged: cut into fragments of about the same size, each every `every` steps in turn.

    Raises ValueError for numbers that cannot work.
    """

    def __init__(self, numels: Sequence[int], every: int, fragments: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1: {every}")
        if not 1 <= fragments <= min(every, len(numels)):
            raise ValueError(
                f"fragments must be at least 1, and at most every={every} and the {len(numels)} parameters: {fragments}"
            )
        self.every = every
        self.fragments = cut(numels, fragments)
        self.steps = 0  # of this rank
        self.rounds = 0  # exchanges so far, the same on every rank
        self._since = [0] * fragments  # steps since the last exchange of each

    def step(self) -> int:
        """Count a step; returns how many exchanges are due after it."""
        self.steps += 1
        self._since = [since + 1 for since in self._since]
        count = len(self.fragments)
        due = [self.every * (fragment + 1) // count % self.every for fragment in range(count)]
        return due.count(self.steps % self.every)

    @property
    def longest(self) -> int:
        """Steps since the oldest of the fragments' last exchanges."""
        return max(self._since)

    @property
    def turn(self) -> int:
        """The number of the fragment that is exchanged next."""
        return self.rounds % len(self.fragments)

    def exchanged(self) -> None:
        """The fragment whose turn it was."""
        self._since[self.turn] = 0
        self.rounds += 1

    def ended(self) -> None:
        """All fragments were exchanged, at the end."""
        self._since = [0] * len(self.fragments)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "rounds": self.rounds, "since": list(self._since)}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state of another number of fragments."""
        if len(state["since"]) != len(self._since):
            raise ValueError(f"the state is of fragments={len(state['since'])}: make LocalSteps with as many")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.rounds, self._since = state["steps"], state["rounds"], list(state["since"])


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Of a copy to which small moves can be added."""
    return torch.promote_types(dtype, torch.float32)


def cut(numels: Sequence[int], count: int) -> list[list[int]]:
    """The indices in `count` parts, one after the other, of about as many elements; none is empty."""
    parts: list[list[int]] = [[]]
    before, total = 0, sum(numels)
    for index, numel in enumerate(numels):
        left, missing = len(numels) - index, count - len(parts)
        full = (before + numel / 2) * count >= total * len(parts)
        if parts[-1] and missing and (full or left == missing):
            parts.append([])
        parts[-1].append(index)
        before += numel
    return parts


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def hash_of(*parts: Any) -> str:
    """Of buffers, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
