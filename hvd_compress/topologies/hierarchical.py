"""Uncompressed inside a node, compressed between nodes: each rank of a node brings its share of the gradients across.

A dense reduce-scatter inside the node, then a gather between the ranks that own the same region on each node, then a
dense allgather inside the node. With G ranks on each of M nodes, and p bytes that one rank's compressed gradients take,
(M - 1) p come into a node, in place of G * G * (M - 1) p where everyone sends to everyone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import messages
from ..compressors import Slot, Step
from ..compressors.codec import Codec, Common
from ..compressors.gradients import flat32
from ..memory import owned_key
from ..requests import AlltoallParts, GroupExchange, Request, Total
from .base import Part, largest_of_all
from .frames import added, encoded
from .nodes import Nodes
from .regions import Piece, regions

_TO_OWNER, _TO_MATES = "to owner", "to mates"


@dataclass(frozen=True)
class Hierarchical:
    """Three rounds. A codec sees a node's sum of a piece as it sees a rank's gradient elsewhere, and a node as a rank.

    alignment: gradients are cut at multiples of it.
    pieces: what was made in earlier steps of those that this rank brings across, by parameter and first element.
    Rounds inside a node do not count as sent.
    """

    codec: Codec
    nodes: Nodes
    alignment: int
    pieces: dict[tuple[int, int], Slot] = field(default_factory=dict, compare=False)

    def reduce(self, parts: Sequence[Part]) -> GroupExchange:
        exchange = _Exchange(self, parts)
        incoming: list[Tensor] = yield AlltoallParts(exchange.for_owners(), exchange.uncounted)
        mine = exchange.added_in_node(incoming)
        del incoming
        if len(self.nodes.members) > 1:
            common = yield from exchange.agreed(mine)
            sent, frames = encoded(self.codec, mine, common)
            shares = exchange.shares(frames)
            answers: list[Tensor] = yield AlltoallParts(exchange.for_counterparts(frames), shares)
            sums = added(self.codec, mine, sent, exchange.of_counterparts(answers, frames)) if mine else []
            totals = [None if of_piece is None else of_piece.values for of_piece in sums]
        else:
            totals = [part.gradient / part.slot.step.divisor for part in mine]
        everyone: list[Tensor] = yield AlltoallParts(exchange.for_mates(totals), exchange.uncounted, last=True)
        return exchange.joined(everyone, totals)


class _Exchange:
    """The work of one rank between the rounds."""

    def __init__(self, topology: Hierarchical, parts: Sequence[Part]) -> None:
        self._topology, self._parts = topology, parts
        nodes, self._step = topology.nodes, parts[0].slot.step
        self._at = nodes.place(self._step.rank)
        self._owned = regions(tuple(part.span for part in parts), topology.alignment, nodes.ranks_per_node)
        told = [(part.slot.parameter.index, part.span) for part in parts]
        self._known = messages.context((topology.codec.algorithm, self._step.number, told))
        self._flats = [flat32(part.gradient).cpu() for part in parts]
        self.uncounted = [0] * len(parts)

    # Inside the node

    def for_owners(self) -> list[list[Tensor]]:
        """For each rank its pieces of this rank's gradients."""
        return self._addressed(
            (mate, self._packed(_TO_OWNER, mate, self._values(pieces)))
            for mate, pieces in zip(self._at.mates, self._owned)
        )

    def added_in_node(self, incoming: Sequence[Tensor]) -> list[Part]:
        """The node's sums of the pieces that this rank owns, added in the order of its ranks."""
        pieces = self._owned[self._at.place]
        totals: list[Tensor] = []
        for mate in self._at.mates:
            if mate == self._step.rank:
                values = self._values(pieces)
            else:
                values = [self._there(value) for value in self._unpacked(_TO_OWNER, mate, pieces, incoming[mate])]
            totals = [total.add_(value) for total, value in zip(totals, values)] or [v.clone() for v in values]
        step = dataclasses.replace(self._step, rank=self._at.node, size=len(self._topology.nodes.members))
        return [Part(self._slot_of(self._parts[p.part], p, step), total) for p, total in zip(pieces, totals)]

    def _values(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [self._flats[piece.part][piece.start : piece.stop] for piece in pieces]

    def for_mates(self, totals: Sequence[Tensor | None]) -> list[list[Tensor]]:
        return self._addressed((mate, self._packed(_TO_MATES, self._step.rank, totals)) for mate in self._at.mates)

    def joined(self, everyone: Sequence[Tensor], mine: Sequence[Tensor | None]) -> list[Total | None]:
        """The sums of whole gradients, divided; None for one that is not finite on some rank."""
        outs = [part.slot.room_for_sum(part.gradient) for part in self._parts]
        finite = [True] * len(outs)
        for mate, pieces in zip(self._at.mates, self._owned):
            own = mate == self._step.rank
            totals = mine if own else self._unpacked(_TO_MATES, mate, pieces, everyone[mate])
            for piece, total in zip(pieces, totals):
                finite[piece.part] &= total is not None
                if total is not None:
                    outs[piece.part][piece.start : piece.stop].copy_(total)
        return [Total(out, self._step.divisor) if there else None for out, there in zip(outs, finite)]

    # Between nodes

    def agreed(self, mine: Sequence[Part]) -> Generator[Request, Any, list[Common | None]]:
        """What the codec is to know of each piece: the largest of all ranks and pieces of its gradient."""
        asks = self._topology.codec.common(self._parts[0].slot, torch.zeros(1)) is not None
        own = [self._topology.codec.common(part.slot, part.gradient) or 0.0 for part in mine]
        if not asks:
            return [None] * len(mine)
        most = [0.0] * len(self._parts)
        pieces = self._owned[self._at.place]
        for piece, value in zip(pieces, own):
            most[piece.part] = max(most[piece.part], value)
        largest = yield from largest_of_all(most)
        return [Common(value, largest[piece.part]) for piece, value in zip(pieces, own)]

    def shares(self, frames: Sequence[Tensor]) -> list[int]:
        shares = [0] * len(self._parts)
        for piece, frame in zip(self._owned[self._at.place], frames):
            shares[piece.part] += frame.numel()
        return shares

    def for_counterparts(self, frames: Sequence[Tensor]) -> list[list[Tensor]]:
        others = set(self._at.counterparts) - {self._step.rank}
        return [list(frames) if rank in others else [] for rank in range(self._step.size)]

    def of_counterparts(self, answers: Sequence[Tensor], frames: Sequence[Tensor]) -> list[Tensor]:
        """By node."""
        own = torch.cat(list(frames))
        return [own if rank == self._step.rank else answers[rank] for rank in self._at.counterparts]

    def _slot_of(self, part: Part, piece: Piece, step: Step) -> Slot:
        """That of a piece, as of a parameter among as many ranks as there are nodes, which are those of `step`."""
        of, pieces = part.slot, self._topology.pieces
        whole = of.parameter
        slot = pieces.get((whole.index, piece.start))
        if slot is None or slot.parameter.numel != piece.numel or slot.memory is not of.memory:
            parameter = dataclasses.replace(
                whole,
                name=owned_key(whole.name, piece.start),
                shape=torch.Size([piece.numel]),
                seed=whole.seed + self._at.place,  # each place draws numbers of its own
            )
            slot = pieces[whole.index, piece.start] = Slot(parameter, memory=of.memory)
        slot.step, slot.rate = step, of.rate
        return slot

    def _addressed(self, to: Iterator[tuple[int, Tensor]]) -> list[list[Tensor]]:
        """By destination; what is for this rank itself is left out."""
        addressed: list[list[Tensor]] = [[] for _ in range(self._step.size)]
        for rank, message in to:
            if rank != self._step.rank:
                addressed[rank].append(message)
        return addressed

    @staticmethod
    def _there(values: Tensor | None) -> Tensor:
        assert values is not None, "inside a node what is not finite travels as it is"
        return values

    def _packed(self, way: str, owner: int, values: Sequence[Tensor | None]) -> Tensor:
        known = messages.context(self._known, way, self._step.rank, owner)
        payloads = [None if value is None else value.contiguous().view(torch.uint8) for value in values]
        return messages.pack(known, payloads, varying=False)

    def _unpacked(self, way: str, peer: int, pieces: Sequence[Piece], message: Tensor) -> list[Tensor | None]:
        owner = self._step.rank if way == _TO_OWNER else peer
        known = messages.context(self._known, way, peer, owner)
        names = ", ".join(dict.fromkeys(self._parts[piece.part].slot.name for piece in pieces))
        lengths = [4 * piece.numel for piece in pieces]
        payloads = messages.unpack(message, known, len(pieces), lengths, peer, names)
        return [None if payload is None else payload.view(torch.float32) for payload in payloads]
