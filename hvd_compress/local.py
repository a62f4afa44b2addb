"""Many ranks simulated in this process, without a launcher: to test, to predict, to study thousands of ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .compressors import Compressor, Slot
from .gradient_compression import GradientCompression
from .requests import Exchange, GroupExchange, Member, Topology, Total
from .topologies import Part
from .transports.local import LocalWorld


class LocalRanks:
    """Exchanges gradients between simulated ranks, one per compression, in lock step.

    compressions: one for each rank, made alike; they may be bound to the same parameters, whose `grad` is not used.
    readers: ranks whose results are wanted, None for all. The others send what they must, but do not decode what all of
        them get, to the same bits: else that work grows with the square of their number.
    Nothing is measured but bytes: there is no network.
    """

    def __init__(self, compressions: Sequence[GradientCompression], *, readers: Collection[int] | None = None) -> None:
        world = LocalWorld(len(compressions))
        self.compressions = list(compressions)
        self.readers = range(len(compressions)) if readers is None else sorted(readers)
        self._engines = []
        for rank, compression in enumerate(compressions):
            if rank not in self.readers:
                _leave_unread(compression)
        for compression, transport in zip(compressions, world.transports):
            compression.unregister()
            engine = compression.attach(transport)
            world.polls[transport.rank] = engine.poll
            self._engines.append(engine)

    def exchange(
        self, gradients: Sequence[Mapping[str, Tensor]], *, average: bool = True, in_place: bool = False
    ) -> list[dict[str, Tensor]]:
        """Combine one step's gradients, {parameter name: gradient} of every rank; returns what every reader then has.

        All ranks must give the same names, but may give them in any order. in_place: results may take the place of the
        readers' gradients, as they do where a model is trained.
        """
        if len(gradients) != len(self.compressions):
            raise ValueError(f"gradients of {len(gradients)} ranks for {len(self.compressions)} compressions")
        index_of = {slot.name: slot.parameter.index for slot in self.compressions[0].slots}
        tickets = [
            {
                name: compression.submit(index_of[name], gradient, in_place=in_place and rank in self.readers)
                for name, gradient in mine.items()
            }
            for rank, (compression, mine) in enumerate(zip(self.compressions, gradients))
        ]
        for engine in self._engines:
            engine.flush()
        results = [
            {name: compression.finish(ticket, mine[name], average=average) for name, ticket in of_rank.items()}
            for compression, mine, of_rank in zip(self.compressions, gradients, tickets)
        ]
        return [results[rank] for rank in self.readers]


@dataclass(frozen=True)
class _Unread:
    """A topology whose last answer nobody reads; zeros are in place of what would come of it."""

    usual: Topology

    def reduce(self, parts: Sequence[Part]) -> GroupExchange:
        exchange = self.usual.reduce(parts)
        request = next(exchange)
        while not request.last:
            request = exchange.send((yield request))
        yield request
        return [Total(torch.zeros(1).expand(part.gradient.numel())) for part in parts]


def _leave_unread(compression: GradientCompression) -> None:
    usual = compression.routing.exchange_of

    def exchange_of(compressor: Compressor, slot: Slot, gradient: Tensor) -> Exchange | Member:
        exchange = usual(compressor, slot, gradient)
        return Member(_Unread(exchange.topology), exchange.part) if isinstance(exchange, Member) else exchange

    compression.routing.exchange_of = exchange_of  # type: ignore[method-assign]
