"""Before the first exchange all ranks compare what they were started with: a difference is an error, not a hang."""

from __future__ import annotations

import atexit
import functools
import itertools
import time
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .log import log
from .transports.base import Pending, Transport

_WARNING_SECONDS = 10.0
_GRACE_SECONDS = 2.0

Description = dict[str, Any]  # JSON-serializable; what must be equal on all ranks


class MismatchError(RuntimeError):
    """The ranks were started with different versions, options, parameter names or shapes."""


@dataclass
class Registry:
    """The compressions made for one set of ranks, in the order in which the program made them."""

    unchecked: dict[int, Description] = field(default_factory=dict)  # by a number that grows as they are made
    numbers: dict[int, int] = field(default_factory=dict)  # of those that were compared: the same on every rank
    checks: int = 0
    members: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def check(self, transport: Transport) -> None:
        """Compare, over all ranks, all that was made and not yet compared.

        All at once because hooks fire in another order on every rank: each may need another compression first.
        """
        mine, self.unchecked = self.unchecked, {}
        self.checks += 1
        named = {str(place): mine[id_] for place, id_ in enumerate(sorted(mine))}
        check(transport, f"hvd_compress.check.{self.checks}", named)
        for id_ in sorted(mine):
            self.numbers[id_] = len(self.numbers)

    def restart(self) -> None:
        """Forget what was compared, as when the ranks have changed: all that are still used register again."""
        self.checks = 0
        self.numbers.clear()


# Per set of ranks, because the number of a compression is part of the names of its collectives. Filled as compressions
# are made; the descriptions keep no parameter alive.
_registries: dict[Hashable, Registry] = {}


def registry_of(process_set: Any) -> Registry:
    """That of a horovod.torch.ProcessSet; None for all ranks."""
    everyone = process_set is None or process_set.process_set_id == 0
    return _registries.setdefault(None if everyone else tuple(process_set.ranks), Registry())


def check(transport: Transport, name: str, mine: dict[str, Description]) -> None:
    """Raise MismatchError, on every rank alike, unless all ranks' descriptions are equal."""
    pending = transport.gather_objects(name, mine)
    _wait(pending, transport.rank)
    everyone: list[dict[str, Description]] = pending.wait()
    for rank, theirs in enumerate(everyone):
        if difference := _difference(everyone[0], theirs, rank):
            _linger_at_exit()
            raise MismatchError(
                f"the ranks disagree: {difference}. Start every rank with the same version of hvd_compress, the same "
                "options and the same model, and make compressions in the same order."
            )


@functools.cache
def _linger_at_exit() -> None:
    """The first rank that ends has the launcher end the others: they are to print their error before."""
    atexit.register(time.sleep, _GRACE_SECONDS)


def _wait(pending: Pending, rank: int) -> None:
    deadline = time.monotonic() + _WARNING_SECONDS
    while not pending.ready():
        if time.monotonic() > deadline:
            deadline = float("inf")
            log.warning(
                "rank %d has waited %.0f s for the other ranks to make their first exchange. If this lasts: do all "
                "ranks pass the same compression=, and does it have the process_set= of the optimizer?",
                rank,
                _WARNING_SECONDS,
            )
        time.sleep(0.001)


def _difference(first: dict[str, Description], other: dict[str, Description], rank: int) -> str | None:
    if first.keys() != other.keys():
        return f"rank 0 made {_names(first)}, rank {rank} made {_names(other)}"
    for serial in first:
        for what in first[serial] | other[serial]:
            a, b = first[serial].get(what), other[serial].get(what)
            if a != b:
                if what == "parameters" and a and b:
                    return _parameter_difference(a, b, rank)
                return f"{what} is {a} on rank 0 and {b} on rank {rank}"
    return None


def _parameter_difference(first: Sequence[Any], other: Sequence[Any], rank: int) -> str:
    for number, (a, b) in enumerate(itertools.zip_longest(first, other)):
        if a != b:
            return f"parameter {number} is {_parameter(a)} on rank 0 and {_parameter(b)} on rank {rank}"
    raise AssertionError("equal parameters")


def _parameter(description: Sequence[Any] | None) -> str:
    if description is None:
        return "missing"
    name, shape, dtype = description
    return f"{name!r} {tuple(shape)} {dtype}"


def _names(descriptions: dict[str, Description]) -> str:
    return "[" + ", ".join(str(description["compressor"]) for description in descriptions.values()) + "]"
