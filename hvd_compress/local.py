"""Many ranks simulated in this process, without a launcher: to test, to predict, to study thousands of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .gradient_compression import GradientCompression
from .transports.local import LocalWorld


class LocalRanks:
    """Exchanges gradients between simulated ranks, one per compression, in lock step.

    compressions: one for each rank, made alike; they may be bound to the same parameters, whose `grad` is not used.
    Nothing is measured but bytes: there is no network.
    """

    def __init__(self, compressions: Sequence[GradientCompression]) -> None:
        world = LocalWorld(len(compressions))
        self.compressions = list(compressions)
        self._engines = []
        for compression, transport in zip(compressions, world.transports):
            compression.delist()
            engine = compression.attach(transport)
            world.polls[transport.rank] = engine.poll
            self._engines.append(engine)

    def exchange(self, gradients: Sequence[Mapping[str, Tensor]], *, average: bool = True) -> list[dict[str, Tensor]]:
        """Combine one step's gradients, {parameter name: gradient} of every rank; returns what every rank then has.

        All ranks must give the same names, but may give them in any order.
        """
        if len(gradients) != len(self.compressions):
            raise ValueError(f"gradients of {len(gradients)} ranks for {len(self.compressions)} compressions")
        index_of = {slot.name: slot.index for slot in self.compressions[0].slots}
        tickets = [
            {name: compression.submit(index_of[name], gradient) for name, gradient in mine.items()}
            for compression, mine in zip(self.compressions, gradients)
        ]
        for engine in self._engines:
            engine.flush()
        return [
            {name: compression.finish(ticket, mine[name], average=average) for name, ticket in of_rank.items()}
            for compression, mine, of_rank in zip(self.compressions, gradients, tickets)
        ]
