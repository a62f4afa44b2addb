"""Process groups for the traffic of compressions: those of one that has ended serve the next one over the same ranks.

A group of Gloo's has threads that wake a hundred times a second, and torch has no way to end it while the program may
hold a tensor that one of them lets go of. So none is ended; as many are made as are in use at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_GROUPS = 2  # of a transport


class Lease:
    """Groups that one transport uses, until `end`."""

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups = groups
        self.works: list[Any] = []  # that were started and may be under way
        self.ended = False

    def started(self, work: Any) -> Any:
        self.works = [one for one in self.works if not one.is_completed()]
        self.works.append(work)
        return work

    def end(self) -> None:
        """Nobody will start anything more."""
        self.ended = True

    @property
    def idle(self) -> bool:
        """Whether another transport may use these groups: nothing is under way that others might never join."""
        return self.ended and all(work.is_completed() for work in self.works)


class _Pool:
    """The groups over some ranks, in the order in which they were made, which is the same on all of them."""

    def __init__(self, ranks: list[int], config: str, device: torch.device) -> None:
        self._ranks, self._config, self._device = ranks, config, device
        self._agreement = self._new()  # for nothing but to find out which groups are idle on all ranks
        self._leases: list[Lease] = []

    def lease(self) -> Lease:
        """Collective."""
        idle = torch.tensor([float(lease.idle) for lease in self._leases], device=self._device)
        if self._leases:
            dist.all_reduce(idle, dist.ReduceOp.MIN, self._agreement)
        number = next((number for number, all_ranks in enumerate(idle.tolist()) if all_ranks), len(self._leases))
        if number == len(self._leases):
            self._leases.append(Lease([self._new() for _ in range(_GROUPS)]))
        else:
            self._leases[number] = Lease(self._leases[number].groups)
        return self._leases[number]

    def _new(self) -> Any:
        return dist.new_group(self._ranks, backend=self._config, use_local_synchronization=True)


_world: Any = None
_pools: dict[tuple[Any, ...], _Pool] = {}


def lease(ranks: list[int], config: str, device: torch.device) -> Lease:
    """Groups over these ranks that nothing else uses. Collective over them."""
    global _world
    if dist.group.WORLD is not _world:  # torch.distributed was initialized anew
        _world = dist.group.WORLD
        _pools.clear()
    key = (*ranks, config)
    if key not in _pools:
        _pools[key] = _Pool(ranks, config, device)
    return _pools[key].lease()
