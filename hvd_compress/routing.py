"""By which topology each gradient of a model travels, and with which others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .compressors import (
    AUTO,
    GATHER,
    HIERARCHICAL,
    TOPOLOGIES,
    Codec,
    Compressor,
    ScaleComCompressor,
    ScatterCodec,
    Slot,
    warn_if_more_than_dense,
)
from .requests import Exchange, Member
from .topologies import Cyclic, Gather, Hierarchical, Nodes, Part, Scatter, Span, regions, spans_of
from .transports.base import Transport


class Routing:
    """Follows the user's choice of a topology, and the plan of buckets; raises ValueError for what cannot be.

    topology, ranks_per_node: as of GradientCompression.
    """

    def __init__(self, compressor: Compressor, topology: str, ranks_per_node: int | None) -> None:
        if problem := _cannot(compressor, topology):
            raise ValueError(problem)
        if ranks_per_node is not None and (topology != HIERARCHICAL or ranks_per_node < 1):
            raise ValueError(
                f"ranks_per_node must be at least 1, and is for topology='hierarchical': {ranks_per_node}, {topology!r}"
            )
        self._compressor = compressor
        self._topology = topology
        self._ranks_per_node = ranks_per_node
        self._nodes = Nodes(((0,),))
        self._slots: Sequence[Slot] = ()
        self._spans: dict[int, Span] = {}  # where each gradient that is compressed lies in its bucket
        self._pieces: dict[tuple[int, int], Slot] = {}  # that this rank brings to other nodes

    def attach(self, transport: Transport, buckets: Sequence[Sequence[int]], slots: Sequence[Slot]) -> None:
        """Start on these ranks, with these buckets; slots know their rank."""
        self._slots, self._spans = slots, spans_of(buckets, slots)
        if self._topology == HIERARCHICAL:
            per_node = self._ranks_per_node
            self._nodes = Nodes.of_so_many(transport.size, per_node) if per_node else Nodes.on(transport.hosts())
            self._pieces.clear()

    def exchange_of(self, compressor: Compressor, slot: Slot, gradient: Tensor) -> Exchange | Member:
        """The exchange of one gradient by `compressor`: by itself, or with others of its bucket."""
        if isinstance(compressor, ScaleComCompressor) and compressor.carried(slot) and slot.step.size > 1:
            return Member(Cyclic(compressor), Part(slot, gradient))
        if not (isinstance(compressor, Codec) and compressor.grouped(slot)):
            return compressor.exchange(slot, gradient)
        if isinstance(compressor, ScatterCodec) and self._can_be_cut(slot):
            part = Part(slot, gradient, self._spans[slot.parameter.index])
            if self._topology == HIERARCHICAL:
                return Member(Hierarchical(compressor, self._nodes, compressor.alignment, self._pieces), part)
            if compressor.scatters(slot, self._topology):
                return Member(Scatter(compressor), part)
        return Member(Gather(compressor), Part(slot, gradient))

    def owned(self) -> set[tuple[str, int, int]]:
        """The pieces of gradients whose sums this rank owns: parameter, first element, elements."""
        codec, hierarchical = self._compressor, self._topology == HIERARCHICAL
        if not isinstance(codec, ScatterCodec):
            return set()
        slots = [slot for slot in self._slots if (self._can_be_cut(slot) if hierarchical else self._scatters(slot))]
        if not slots:
            return set()
        spans = tuple(self._spans[slot.parameter.index] for slot in slots)
        owners, place = slots[0].step.size, slots[0].step.rank
        if hierarchical:
            owners, place = self._nodes.ranks_per_node, self._nodes.place(place).place
        mine = regions(spans, codec.alignment, owners)[place]
        return {(slots[piece.part].name, piece.start, piece.numel) for piece in mine}

    def held(self, slot: Slot) -> dict[str, int]:
        """Bytes that this rank holds between steps for a gradient, by what, as Compressor.held."""
        compressor = self._compressor
        if self._topology == HIERARCHICAL and self._can_be_cut(slot):
            if len(self._nodes.members) == 1:
                return {}
            share = -(-slot.parameter.numel // self._nodes.ranks_per_node)
            piece = dataclasses.replace(slot.parameter, shape=torch.Size([share]))
            return compressor.held(dataclasses.replace(slot, parameter=piece))
        if isinstance(compressor, ScatterCodec) and self._scatters(slot):
            return compressor.held_scattered(slot)
        return compressor.held(slot)

    def say_if_more_than_dense(self, rank: int, size: int) -> None:
        """With so many ranks a method may move more than no compression."""
        shapes = [slot.parameter.shape for slot in self._slots if slot.parameter.compressed]
        size = len(self._nodes.members) if self._topology == HIERARCHICAL else size
        warn_if_more_than_dense(self._compressor, shapes, rank, size, self._topology)

    def _can_be_cut(self, slot: Slot) -> bool:
        return slot.step.size > 1 and slot.parameter.index in self._spans

    def _scatters(self, slot: Slot) -> bool:
        codec = self._compressor
        return self._can_be_cut(slot) and isinstance(codec, ScatterCodec) and codec.scatters(slot, self._topology)


def _cannot(compressor: Compressor, topology: str) -> str | None:
    """Why gradients cannot be exchanged by this topology, and the remedy; None if they can."""
    if topology not in TOPOLOGIES:
        return f"topology must be one of {', '.join(TOPOLOGIES)}: {topology!r}"
    if topology == AUTO or (topology == GATHER and isinstance(compressor, Codec)):
        return None
    if isinstance(compressor, ScatterCodec):
        why = compressor.whole()
        if topology == HIERARCHICAL and compressor.keeps_momentum:
            why = "the momentum that it has itself is that of a rank, not of a node"
    elif isinstance(compressor, Codec):
        why = "what it sends of a gradient depends on the whole of it"
    else:
        why = "it sends sums, or in rounds of its own, and nothing else"
    return why and f"topology={topology!r} is not possible with {compressor}: {why}. Give topology='auto'"
