"""How many bits each layer's saved tensors are kept in."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Union

from torch import nn

from .. import kernels
from ..adaptive.solver import solve
from .rules import LINEAR, NONLINEAR

Bits = Union[int, Callable[[], float]]  # a number, or what gives it at each forward pass

_CHOICES = range(1, 9)


class Precision:
    """What the user has asked for, and what was chosen for each layer since.

    Raises ValueError for numbers of bits that cannot be, and for patterns that fit no module of `model`.
    """

    def __init__(self, model: nn.Module, bits: Bits, nonlinear_bits: Bits, layers: Mapping[str, int], min_numel: int):
        self._asked = {"bits": bits, "nonlinear_bits": nonlinear_bits}
        self.bits, self.nonlinear_bits = self._now()
        self.layers = dict(layers)
        if min_numel < 1:
            raise ValueError(f"min_numel must be at least 1: {min_numel}")
        self.min_numel = min_numel
        self.chosen: dict[str, int] = {}  # for what is linear, by layer
        self.only: Collection[str] | None = None  # while noise is measured: the layers that make it
        self._check_layers([name for name, _ in model.named_modules()])

    def begin(self) -> None:
        """A forward pass begins. What was chosen for layers is for as many bits as it was chosen by."""
        bits, self.nonlinear_bits = self._now()
        if bits != self.bits:
            self.bits, self.chosen = bits, {}

    def _now(self) -> list[int]:
        return [_bits(what, bits() if callable(bits) else bits) for what, bits in self._asked.items()]

    def _check_layers(self, names: Sequence[str]) -> None:
        for pattern, bits in self.layers.items():
            if bits != 0:
                _bits(f"layers[{pattern!r}]", bits)
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"layers has {pattern!r}, which fits no module; there are {', '.join(names[1:])}")

    def bits_of(self, layer: str, rule: str) -> int:
        """Of what this module keeps for functions of this rule; 0 for as it is."""
        if self.only is not None and (rule != LINEAR or layer not in self.only):
            return 0
        for pattern, bits in self.layers.items():
            if fnmatch.fnmatchcase(layer, pattern):
                return bits
        return self.nonlinear_bits if rule == NONLINEAR else self.chosen.get(layer, self.bits)

    def least(self, noise: Mapping[str, float], elements: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The bits for what is linear that take the least in all, and make no more noise than those of now.

        noise: mean square error in the gradients by what each layer keeps in its bits of now; elements: of the tensors
        that it keeps. Layers that the user has named are left out.
        """
        free = [layer for layer in noise if not any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.layers)]
        if not free:
            return {}
        now = [self.bits_of(layer, LINEAR) for layer in free]
        # The error of a code is proportional to its step.
        errors = [[noise[layer] * _step(bits) ** 2 / _step(b) ** 2 for bits in _CHOICES] for layer, b in zip(free, now)]
        costs = [[sum(kernels.affine_bytes(n, bits) for n in elements[layer]) for bits in _CHOICES] for layer in free]
        plan = solve(errors, costs, reference=[_CHOICES.index(bits) for bits in now])
        return {layer: _CHOICES[choice] for layer, choice in zip(free, plan.choice)}


def _step(bits: int) -> float:
    """As a part of the range of a block."""
    return 1 / (2**bits - 1)


def _bits(what: str, value: float) -> int:
    if value not in _CHOICES:
        raise ValueError(f"{what} must be a whole number from 1 to 8: {value}")
    return int(value)
