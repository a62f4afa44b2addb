"""Compares methods, on every topology that they have, with what Horovod has itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gradient_compression import GradientCompression
from .timeline import Cluster, Compute, Step, predicted
from .work import Named, Work, measured

PLAIN = ("none", "fp16")  # what Horovod has itself
GAIN = 0.02  # of a step, that a method must save to be recommended
SUM = "sum"  # in the place of a topology, where there is but one way
RATES = np.logspace(4, 12.5, 300)  # bytes a second
_TOPOLOGIES = ("gather", "scatter", "hierarchical")

Maker = Callable[..., GradientCompression]  # of named parameters and further options


@dataclass(frozen=True)
class Row:
    """A method on a topology, and what was found of it."""

    method: str
    topology: str
    make: Maker
    options: Mapping[str, Any]  # that choose the topology
    slow_with_adam: bool
    work: Work
    step: Step
    pays_below: float | None = None  # bytes a second; infinite for any link, None for no link

    @property
    def name(self) -> str:
        return self.method if self.topology == SUM else f"{self.method}, {self.topology}"

    @property
    def plain(self) -> bool:
        return self.method in PLAIN

    def seconds_at(self, rate: float, cluster: Cluster, compute: Compute) -> float:
        """Of a step where nodes have a link of `rate` bytes a second."""
        return predicted(self.work, cluster.at(rate), compute).seconds

    def seconds_with(self, ranks: int, named: Named, cluster: Cluster, compute: Compute) -> float:
        """Of a step of so many ranks, whose work is measured."""
        work = measured(self._make, named, ranks, cluster.ranks_per_node, steps=3)
        return predicted(work, dataclasses.replace(cluster, ranks=ranks), compute).seconds

    def _make(self, named: Iterable[tuple[str, Tensor]]) -> GradientCompression:
        return self.make(named, **self.options)


def compared(makers: Mapping[str, Maker], named: Named, cluster: Cluster, compute: Compute) -> list[Row]:
    """Rows of all methods, by their names, which must have those of PLAIN among them."""
    rows: list[Row] = []
    for text, make in makers.items():
        for topology, options in ways(make, cluster):

            def bound(of: Iterable[tuple[str, Tensor]], make: Maker = make, options: Any = options) -> Any:
                return make(of, **options)

            work = measured(bound, named, cluster.ranks, cluster.ranks_per_node)
            slow = bound(_PROBE).compressor.slow_with_adam
            rows.append(Row(text, topology, make, options, slow, work, predicted(work, cluster, compute)))
    return [dataclasses.replace(row, pays_below=_pays_below(row, rows, cluster, compute)) for row in rows]


_PROBE = [("weight", torch.zeros(64, 64))]


def ways(make: Maker, cluster: Cluster) -> Iterator[tuple[str, dict[str, Any]]]:
    """The topologies that a method has, with the options that choose them. Raises ValueError for its own options."""
    make(_PROBE).unregister()
    found = False
    for topology in _TOPOLOGIES:
        options: dict[str, Any] = {"topology": topology}
        if topology == "hierarchical":
            if cluster.ranks_per_node == 1:
                continue
            options["ranks_per_node"] = cluster.ranks_per_node
        try:
            make(_PROBE, **options).unregister()
        except ValueError:  # which says that it does not have this one
            continue
        found = True
        yield topology, options
    if not found:
        yield SUM, {}


def _pays_below(row: Row, rows: Sequence[Row], cluster: Cluster, compute: Compute) -> float | None:
    """The fastest link on which it is faster than what Horovod has itself."""
    if row.plain:
        return None

    def pays(rate: float) -> bool:
        plain = min(other.seconds_at(rate, cluster, compute) for other in rows if other.plain)
        return row.seconds_at(rate, cluster, compute) < (1 - GAIN) * plain

    paying = [float(rate) for rate in RATES if pays(rate)]
    if not paying:
        return None
    return math.inf if paying[-1] == RATES[-1] else paying[-1]


def plain_of(rows: Sequence[Row]) -> Row:
    """The faster of what Horovod has itself."""
    return min((row for row in rows if row.plain), key=lambda row: row.step.seconds)


def recommended(rows: Sequence[Row], *, adam: bool) -> Row:
    """The fastest; where none is faster than what Horovod has itself, that.

    adam: without methods that were seen to slow an optimizer of Adam's kind down.
    """
    plain = plain_of(rows)
    allowed = [row for row in rows if not row.plain and not (adam and row.slow_with_adam)]
    best = min(allowed, key=lambda row: row.step.seconds, default=plain)
    return best if best.step.seconds < (1 - GAIN) * plain.step.seconds else plain
