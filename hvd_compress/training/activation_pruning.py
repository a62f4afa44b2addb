"""Stochastic pruning of activation gradients during backward (Ye et al., ECCV 2020, arXiv 1908.00173)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from ..kernels import prune_dense, stream_key

Place = Literal["input", "output"]


@dataclass(frozen=True)
class Realised:
    """Counts of one module since pruning began there: gradient elements pruned over, and how they fared.

    below: fraction smaller than the threshold, which aims at the rate. zero: fraction that is zero after pruning, None
    unless zeros are counted.
    """

    elements: int
    below: float
    zero: float | None


def threshold_of(mean_magnitude: float, rate: float) -> float:
    """Below which a fraction `rate` of a zero-mean normal variable lies whose mean magnitude this is.

    Phi^-1((1 + rate) / 2) * sigma, and sigma = sqrt(pi / 2) * mean magnitude.
    """
    return NormalDist().inv_cdf((1 + rate) / 2) * (math.sqrt(math.pi / 2) * mean_magnitude)


def find_places(model: nn.Module) -> dict[str, Place]:
    """Where to prune, by module name: the paper's two cases, found from the order in which modules were registered.

    A convolution before a ReLU prunes the gradient of its input, which it hands on to the layer before. One before a
    batch normalisation prunes the gradient of its output, which the normalisation makes dense and nearly normal.
    """
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    places: dict[str, Place] = {}
    for (name, module), (_, after) in zip(leaves, leaves[1:]):
        if isinstance(module, _ConvNd) and isinstance(after, _BatchNorm):
            places[name] = "output"
        elif isinstance(module, _ConvNd) and isinstance(after, (nn.ReLU, nn.ReLU6)):
            places[name] = "input"
    return places


def prune_activation_gradients(
    model: nn.Module,
    rate: float = 0.9,
    *,
    modules: Mapping[str, Place] | None = None,
    history: int = 5,
    seed: int = 0,
    count_zeros: bool = False,
) -> ActivationPruning:
    """Prune activation gradients in every backward pass, until the result's `remove()` or the end of its `with` block.

    rate: the fraction of elements to bring below the threshold, in (0, 1). Each of those becomes plus or minus the
        threshold, or zero, so that the expectation stays; of a normal gradient 54 % are zero at 0.9.
    modules: which gradient to prune by module name, of its "input" or its "output"; None for `find_places(model)`.
    history: the threshold is the mean of those of so many last passes, to spare this one a second pass; until there are
        as many nothing is pruned.
    seed: of the random bits. Where ranks train together each needs its own, such as hvd.rank(), or their errors agree
        and do not average out.
    count_zeros: also count what is zero after pruning, for one more pass.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1): {rate}")
    if history < 1:
        raise ValueError(f"history must be at least 1: {history}")
    places = find_places(model) if modules is None else dict(modules)
    if not places:
        raise ValueError(
            "no convolution is registered right before a ReLU or batch normalisation: name the places to prune, such "
            "as modules={'conv2': 'input'}"
        )
    return ActivationPruning(model, rate, places, history, seed, count_zeros)


class ActivationPruning:
    """A handle on pruning that is under way, and what it has done."""

    def __init__(
        self, model: nn.Module, rate: float, places: Mapping[str, Place], history: int, seed: int, count_zeros: bool
    ) -> None:
        found = dict(model.named_modules())
        for name, place in places.items():
            if name not in found or place not in ("input", "output"):
                raise ValueError(
                    f"modules={{{name!r}: {place!r}}} must give 'input' or 'output' of one of {', '.join(found)}"
                )
        self._sites = {
            name: _Site(index, rate, history, seed, count_zeros) for index, name in enumerate(sorted(places))
        }
        self._handles: list[RemovableHandle] = []
        for name, site in self._sites.items():
            watch = _watch_input if places[name] == "input" else _watch_output
            self._handles.append(watch(found[name], site))

    def __enter__(self) -> ActivationPruning:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop pruning, from the next forward pass on."""
        for handle in self._handles:
            handle.remove()

    def realised(self) -> dict[str, Realised]:
        """By module name; only modules in which something was pruned already."""
        return {name: site.realised() for name, site in self._sites.items() if site.elements}

    def thresholds(self) -> dict[str, float | None]:
        """What the next pass will prune with, by module name; None while the history is too short."""
        return {name: site.predicted() for name, site in self._sites.items()}

    def state_dict(self) -> dict[str, Any]:
        """Thresholds and counts, to resume to the same bits."""
        return {name: site.state() for name, site in self._sites.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.keys() != self._sites.keys():
            raise ValueError(f"the state is of the modules {', '.join(state)}, not {', '.join(self._sites)}")
        for name, site in self._sites.items():
            site.load(state[name])


class _Site:
    """One gradient that is pruned: its thresholds, the number of its passes, its counts."""

    def __init__(self, index: int, rate: float, history: int, seed: int, count_zeros: bool) -> None:
        self._index, self._rate, self._seed, self._count_zeros = index, rate, seed, count_zeros
        self._thresholds: deque[float] = deque(maxlen=history)
        self._passes = self.elements = self._below = self._zeros = 0

    def predicted(self) -> float | None:
        if len(self._thresholds) < (self._thresholds.maxlen or 0):
            return None
        return sum(self._thresholds) / len(self._thresholds)

    def prune(self, gradient: Tensor) -> Tensor:
        """Called by autograd with the gradient; what it returns goes on in its place."""
        if gradient.requires_grad:
            raise RuntimeError("pruned gradients cannot be differentiated again: remove() before create_graph=True")
        threshold = self.predicted()
        pruned, total, below = prune_dense(
            gradient, threshold or 0.0, stream_key(self._seed, self._index, self._passes)
        )
        self._passes += 1
        if gradient.numel() and math.isfinite(total):  # an overflow of mixed precision says nothing of the next pass
            self._thresholds.append(threshold_of(total / gradient.numel(), self._rate))
        if threshold is not None:
            self.elements += gradient.numel()
            self._below += below
            self._zeros += int((pruned == 0).sum()) if self._count_zeros else 0
        return pruned

    def realised(self) -> Realised:
        zero = self._zeros / self.elements if self._count_zeros else None
        return Realised(self.elements, self._below / self.elements, zero)

    def state(self) -> dict[str, Any]:
        counts = [self._passes, self.elements, self._below, self._zeros]
        return {"thresholds": list(self._thresholds), "counts": counts}

    def load(self, state: Mapping[str, Any]) -> None:
        self._thresholds = deque(state["thresholds"], self._thresholds.maxlen)
        self._passes, self.elements, self._below, self._zeros = state["counts"]


def _watch_input(module: nn.Module, site: _Site) -> RemovableHandle:
    def before_forward(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].requires_grad:
            return None  # the first layer: nobody wants the gradient of the data
        mine = inputs[0].view_as(inputs[0])  # what other layers contribute to the gradient of the same tensor stays
        mine.register_hook(site.prune)
        return (mine, *inputs[1:])

    return module.register_forward_pre_hook(before_forward)


def _watch_output(module: nn.Module, site: _Site) -> RemovableHandle:
    def after_forward(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(site.prune)

    return module.register_forward_hook(after_forward)
