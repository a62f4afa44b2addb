"""Which ranks share a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """Where a rank is among nodes."""

    node: int  # its number
    place: int  # in the node
    mates: tuple[int, ...]  # the ranks of its node, itself included
    counterparts: tuple[int, ...]  # the ranks at its place on all nodes, itself included


@dataclass(frozen=True)
class Nodes:
    """The ranks of every node, as many on each; nodes in the order of their first ranks."""

    members: tuple[tuple[int, ...], ...]

    @classmethod
    def on(cls, hosts: Sequence[str]) -> Nodes:
        """By the host of every rank. Raises ValueError where some have more ranks than others."""
        counts = Counter(hosts)
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} on {host}" for host, count in counts.items())
            raise ValueError(
                f"topology='hierarchical' needs as many ranks on each node, and there are {told}: start as many on "
                "each, or give another topology"
            )
        return cls(tuple(tuple(rank for rank, at in enumerate(hosts) if at == host) for host in counts))

    @classmethod
    def of_so_many(cls, size: int, ranks_per_node: int) -> Nodes:
        """Of ranks that follow each other. Raises ValueError where they do not come out even."""
        if size % ranks_per_node:
            raise ValueError(f"ranks_per_node={ranks_per_node} does not divide the number of ranks, {size}")
        return cls.on([str(rank // ranks_per_node) for rank in range(size)])

    @property
    def ranks_per_node(self) -> int:
        return len(self.members[0])

    def place(self, rank: int) -> Place:
        node = next(number for number, ranks in enumerate(self.members) if rank in ranks)
        place = self.members[node].index(rank)
        return Place(node, place, self.members[node], tuple(ranks[place] for ranks in self.members))
