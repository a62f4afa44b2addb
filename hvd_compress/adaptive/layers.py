"""The layers whose rates may change: what each can choose from, and what a choice sends and loses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..compressors import Compressor, Slot


class Adaptable(Protocol):
    """What a compressor has whose rate may differ by layer and change over time."""

    def rate_of(self, slot: Slot) -> float:
        """That of this step: a controller's choice, `slot.rate`, or the compressor's own."""

    def candidates(self, shape: torch.Size) -> tuple[float, ...]:
        """The rates that a gradient of `shape` can travel at."""

    def errors(self, gradient: Tensor, rates: Sequence[float]) -> list[float]:
        """L2 norm of gradient - C(gradient) at each rate."""

    def payload_bytes(self, shape: torch.Size, rate: float) -> int:
        """What a rank sends of it at this rate, frame included."""

    def messages(self, shape: torch.Size, rate: float) -> int:
        """In how many messages, one after the other."""

    @property
    def gathers(self) -> bool:
        """Whether messages are gathered; else they are added up on their way."""


@dataclass(frozen=True)
class Layer:
    """One parameter; `reference` is the place of the compressor's own rate among `rates`, which ascend."""

    name: str
    index: int  # of its slot
    shape: torch.Size
    rates: tuple[float, ...]
    reference: int


def check_adaptable(compressor: Compressor) -> Any:
    """The compressor, if it is Adaptable; else raises ValueError."""
    if not all(hasattr(compressor, name) for name in ("candidates", "errors", "payload_bytes")):
        raise ValueError(
            f"{type(compressor).__name__} has no rates to choose from: give Compression.qsgd, topk, powersgd or adacomp"
        )
    return compressor


def own_rate(compressor: Any, slot: Slot, step: int) -> float:
    """The rate that the compressor itself gives a parameter at `step`."""
    return float(compressor.rate_of(dataclasses.replace(_at(slot, step), rate=None)))


def present_rate(compressor: Any, slot: Slot, step: int) -> float:
    """The rate that a parameter travels at in `step`: a controller's choice, or the compressor's own."""
    return float(compressor.rate_of(_at(slot, step)))


def _at(slot: Slot, step: int) -> Slot:
    return dataclasses.replace(slot, step=dataclasses.replace(slot.step, number=step))


def layers_of(
    compressor: Any,
    slots: Sequence[Slot],
    step: int,
    *,
    reach: float,
    given: Sequence[float] = (),
    extra: Sequence[float] = (),
) -> list[Layer]:
    """Of the compressed parameters those that have a choice, of rates up to a factor `reach` from the compressor's own.

    given: rates to choose from in place of the compressor's candidates; extra: rates that are taken in any case.
    """
    layers = []
    for slot in slots:
        candidates = compressor.candidates(slot.parameter.shape) if slot.parameter.compressed else ()
        if candidates:
            own = own_rate(compressor, slot, step)
            near = {float(rate) for rate in given or candidates if own / reach <= rate <= own * reach}
            rates = tuple(sorted(near | {own, *map(float, extra)}))
            layers.append(Layer(slot.name, slot.parameter.index, slot.parameter.shape, rates, rates.index(own)))
    return layers


def payload_table(compressor: Any, layers: Sequence[Layer]) -> np.ndarray:
    """Bytes, float64 [layers, candidates]; infinite past a layer's last candidate."""
    return _padded(
        [[compressor.payload_bytes(layer.shape, rate) for rate in layer.rates] for layer in layers], math.inf
    )


def message_table(compressor: Any, layers: Sequence[Layer]) -> np.ndarray:
    """In how many messages a gradient travels, float64 [layers, candidates]."""
    return _padded([[compressor.messages(layer.shape, rate) for rate in layer.rates] for layer in layers], 1)


def error_table(
    compressor: Any, layers: Sequence[Layer], gradients: dict[str, Tensor], rates: Sequence[Sequence[float]]
) -> np.ndarray:
    """Errors of these gradients at `rates` of each layer, float64 [layers, most rates]; zeros where there is none.

    Rounded to float32, so that the float64 sum over the ranks is exact, whatever the order in which it is made.
    """
    rows: list[Sequence[float]] = []
    for layer, candidates in zip(layers, rates):
        gradient = gradients.get(layer.name)
        if gradient is None:
            rows.append([0.0] * len(candidates))
        else:
            rows.append(compressor.errors(gradient.view(layer.shape), candidates))
    return _padded(rows, 0.0).astype(np.float32).astype(np.float64)


def _padded(rows: Sequence[Sequence[float]], filling: float) -> np.ndarray:
    table = np.full((len(rows), max(map(len, rows), default=0)), filling, np.float64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table
