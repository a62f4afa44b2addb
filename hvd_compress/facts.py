"""What one rank alone sees must decide no collective: before any acts on it, all ranks put together what they saw."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch

from .requests import ReduceOp
from .transports.base import Transport

_NAME = "hvd_compress.agreement"


class Fact(enum.IntEnum):
    """What a rank may have seen of a parameter: 0 or 1, but for SPARSE."""

    DENSE = 0  # it has a gradient to be combined, a dense one
    SPARSE = 1  # or a sparse one: the number of its sparse dimensions
    HANDED_IN = 2  # its exchange has begun
    OFTEN = 3  # its hook fired more often than once in each of the announced backward passes
    CHANGED = 4  # its gradient was changed after its hook had fired
    TRAINED = 5
    FROZEN = 6  # requires_grad is False
    ABSENT = 7  # it is in no group of the optimizer


class General(enum.IntEnum):
    """What a rank may have seen of its optimizer; in the row after those of the parameters."""

    FAULT = 0  # something that only an error can answer
    THREW = 1  # exchanges have begun of gradients that were thrown away
    KEPT = 2  # exchanges have begun of gradients that were not


class Facts:
    """What one rank saw, or any of them did: for each parameter, by Fact, a number from 0 to 255."""

    def __init__(self, parameters: int, data: bytes | bytearray | None = None) -> None:
        self.parameters = parameters
        self.data = bytearray(len(Fact) * (parameters + 1)) if data is None else data

    def note(self, index: int, fact: Fact | General, value: int = 1) -> None:
        self.data[len(Fact) * index + fact] = value  # type: ignore[index]

    def note_general(self, fact: General, value: bool) -> None:
        self.note(self.parameters, fact, value)

    def of(self, index: int, fact: Fact) -> int:
        return self.data[len(Fact) * index + fact]

    def where(self, fact: Fact) -> list[int]:
        """The parameters of which this was seen."""
        column = self.data[fact : len(Fact) * self.parameters : len(Fact)]
        return [index for index, value in enumerate(column) if value] if any(column) else []

    def general(self, fact: General) -> bool:
        return bool(self.data[len(Fact) * self.parameters + fact])


class Agreement:
    """Collectives of the main thread, over a transport of their own: they cannot come between those of an engine."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def put_together(self, mine: Facts) -> Facts:
        """The largest number that any rank saw, for every fact; the same answer on every rank."""
        pending = self.transport.allreduce(
            _NAME, torch.frombuffer(bytearray(mine.data), dtype=torch.uint8), ReduceOp.MAX
        )
        return Facts(mine.parameters, pending.wait().numpy().tobytes())

    def of_all(self, mine: Facts) -> list[Facts]:
        """What every rank saw, in rank order."""
        parts = [torch.frombuffer(bytearray(mine.data), dtype=torch.uint8)]
        answers = self.transport.allgather(_NAME, parts).wait()
        return [Facts(mine.parameters, answer.numpy().tobytes()) for answer in answers]

    def texts(self, mine: str | None) -> list[str | None]:
        """What every rank has to say, in rank order."""
        texts: list[str | None] = self.transport.gather_objects(_NAME, mine).wait()
        return texts

    def sum(self, mine: float | None) -> float | None:
        """The sum over the ranks, the same bits on all of them; None if any has nothing to add."""
        values: Sequence[float | None] = self.transport.gather_objects(_NAME, mine).wait()
        return None if any(value is None for value in values) else sum(values)  # type: ignore[arg-type]
