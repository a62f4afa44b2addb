"""The contract of every algorithm: how one rank's gradient becomes requests, and the answers a sum over the ranks."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..requests import Allreduce, Exchange, Total
from ..schedules import value_at
from .footprint import Sent
from .gradients import flat32, max_abs, widened
from .slot import Slot


class Compressor(abc.ABC):
    """An algorithm with its options: a frozen dataclass, hence comparable, hashable and printable.

    It holds no state: residuals are in the slot's memory, random numbers come from (seed, parameter, step, rank).
    """

    algorithm: ClassVar[int]  # id in the frames; never reused
    stateful: ClassVar[bool] = False  # whether it keeps residuals in the slot's memory
    takes_all: ClassVar[bool] = False  # whether it sees the parameters that are not compressed, too
    replaces: ClassVar[str] = ""  # what it does in place of the optimizer
    slow_with_adam: ClassVar[bool] = False  # whether Adam was seen to learn more slowly by what it sends
    gathers: ClassVar[bool] = False  # whether its messages are gathered; else they are added up on their way
    label: ClassVar[str] = ""  # of its method of Compression, where that is not the name of the class

    def chosen(self, slot: Slot) -> Compressor | None:
        """Who exchanges this parameter in this step: the same on every rank. None for as it is."""
        return self if slot.parameter.compressed or self.takes_all else None

    def terms(self, slots: Sequence[Slot], step: int) -> Mapping[str, str]:
        """What decides the collectives of `step` besides the options, in words by what it is: schedules, masks."""
        options = self.options().items()
        return {name: repr(value_at(value, step)) for name, value in options if callable(value)}

    @property
    def varies(self) -> bool:
        """Whether all ranks must compare `terms` before each step, since these may change while training runs."""
        return any(callable(value) for value in self.options().values())

    def disagreement(self, what: str, ranks_by_state: Mapping[str, Sequence[int]], size: int) -> Exception | None:
        """The error for terms that differ; None for the usual one."""
        return None

    def conflict(self, optimizer: torch.optim.Optimizer) -> str | None:
        """What is wrong with exchanging gradients for this optimizer so, and the remedy; None if nothing is."""
        return None

    @property
    def keeps_momentum(self) -> bool:
        """Whether its state has the momentum of this rank's gradients."""
        return False

    @property
    def changes_meaning(self) -> bool:
        """Whether what comes of an exchange is a gradient in some steps, and something else in others."""
        return False

    def gives_momentum(self, slot: Slot) -> bool:
        """Whether what comes of this step's exchange is momentum, for an optimizer that takes it for one."""
        return False

    def switched_off(self, plain: Compressor) -> Compressor:
        """What takes its place where nothing is to be compressed; `plain` sends gradients as they are."""
        return plain

    @abc.abstractmethod
    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        """Exchange `gradient`, of any floating dtype and shape, which stays as it is; see requests.Exchange."""

    def rate_of(self, slot: Slot) -> float | None:
        """The density, bits or the like of this step: a controller's, or its own; None where there is no such thing."""
        return None

    def sent(self, slot: Slot) -> Sent | None:
        """What a rank gives to collectives for a float32 gradient at the present rate, about; None where unknown."""
        return None

    def messages(self, shape: torch.Size, rate: float) -> int:
        """In how many messages, one after the other, a gradient of `shape` travels at this rate."""
        return 1

    def held(self, slot: Slot) -> dict[str, int]:
        """Bytes that a rank holds between steps for a float32 gradient at the present rate: by what, as memory.Held."""
        return {}

    def cached(self, slot: Slot) -> Sequence[Tensor]:
        """The tensors of its own that `slot.cache` holds."""
        return ()

    def owed(self, slot: Slot, gradient: Tensor) -> Tensor:
        """All that an exchange would send if it lost nothing, [numel]: the gradient, and what was not sent before."""
        return slot.memory.compensate(slot.name, flat32(gradient)) if self.stateful else gradient.detach().reshape(-1)

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


class SummedCompressor(Compressor):
    """An algorithm whose whole exchange is one SUM of a type that Horovod and MPI can add: no frames, no carrier."""

    @abc.abstractmethod
    def summand(self, gradient: Tensor, size: int = 1) -> Tensor:
        """What is added up over the ranks in place of `gradient`.

        size: of how many summands the sum may be too large for float16, though their mean is not: where that is the
            type, they are divided by a power of two that is no smaller. It costs numbers below 2**-14 * size bits.
        """

    def restore(self, total: Tensor, shape: torch.Size, dtype: torch.dtype, size: int = 1) -> Tensor:
        """The aggregated gradient, from what came of the summands of this `size`."""
        return widened(total, size).to(dtype)

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        dtype = torch.float32 if gradient.dtype != torch.float64 else torch.float64
        summand = self.summand(gradient)
        half: Tensor = yield Allreduce(summand, last=summand.dtype != torch.float16)
        total = half.to(dtype).reshape(-1)
        if half.dtype == torch.float16 and slot.step.size > 1 and not math.isfinite(max_abs(total)):
            # As seldom as gradients are so large; dividing all of them would cost small ones their bits.
            smaller: Tensor = yield Allreduce(self.summand(gradient, slot.step.size), last=True)
            total = torch.where(total.isfinite(), total, widened(smaller, slot.step.size).to(dtype).reshape(-1))
        return Total(total)
