"""One bit an element with error feedback, as it is and as 1-bit Adam has it.

Signs with the mean magnitude of their bucket are EF-signSGD (Karimireddy et al., ICML 2019, arXiv 1901.09847) and its
form with workers and servers (Zheng et al., NeurIPS 2019, arXiv 1905.10936). 1-bit Adam (Tang et al., ICML 2021, arXiv
2102.02888) sends its first moment so, after some steps as usual, in which the second moment settles. 0/1 Adam (Lu et
al., ICLR 2023, arXiv 2202.06009) goes on with such steps, ever more rarely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES, MOMENTUM, RESIDUALS, SPARE, added, key, owned_key
from ..requests import Allreduce, Exchange, Total
from .codec import Common, ScatterCodec
from .footprint import Sent
from .frames import frame_room
from .gradients import flat, flat32, max_abs, momentum_of
from .slot import Slot


@dataclass(frozen=True)
class OneBitCompressor(ScatterCodec):
    """Sends the sign of each element of what has accumulated, and the mean magnitude of each bucket of them.

    Accumulated is gradient + residual. With `momentum` it is u + residual, where u <- momentum * u + gradient is this
    rank's, and what comes out is (1 - momentum) times the sum over the ranks, as large as gradients are: the first
    moment, for an optimizer that takes it so, as optim.OneBitAdam. Where owners add up pieces they send signs of the
    sums, with a residual of their own, as the servers of both papers.

    momentum: in [0, 1); 0 for none.
    warmup_steps: so many gradients travel as they are first, and come out as they are.
    variance_update_scaler: after them some still do, for the second moment: at first each, then, whenever there were so
        many, half as often; 0 for none.
    bucket_size: elements that share a mean magnitude, a multiple of 256.
    """

    momentum: float = 0.0
    warmup_steps: int = 0
    variance_update_scaler: int = 0
    bucket_size: int = 256

    algorithm = 13
    stateful = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1): {self.momentum}")
        if not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a whole number, at least 0: {self.warmup_steps!r}")
        if not isinstance(self.variance_update_scaler, int) or self.variance_update_scaler < 0:
            raise ValueError(
                f"variance_update_scaler must be a whole number, at least 0: {self.variance_update_scaler!r}"
            )
        block = kernels.QUANTISED_BLOCK
        if not isinstance(self.bucket_size, int) or self.bucket_size < block or self.bucket_size % block:
            raise ValueError(f"bucket_size must be a positive multiple of {block}: {self.bucket_size!r}")

    def as_it_is(self, step: int) -> bool:
        """Whether gradients travel as they are in this step.

        With the scaler k after W steps of warm-up those are T_v of 0/1 Adam: t_0 = W, t_(j+1) = t_j + 2**floor(j / k).
        """
        after, k = step - self.warmup_steps, self.variance_update_scaler
        if after < 0 or not k:
            return after < 0
        interval = 1 << (after // k + 1).bit_length() - 1  # which began k * (interval - 1) steps after the warm-up
        return (after - k * (interval - 1)) % interval == 0

    def grouped(self, slot: Slot) -> bool:
        return not self.as_it_is(slot.step.number) and self._saves(slot)

    @property
    def keeps_momentum(self) -> bool:
        return self.momentum > 0

    @property
    def changes_meaning(self) -> bool:
        return self.keeps_momentum

    def gives_momentum(self, slot: Slot) -> bool:
        return self.keeps_momentum and self.grouped(slot)

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        """As it is, where the second moment is to see it, or where that is less."""
        if self.grouped(slot):
            return (yield from super().exchange(slot, gradient))
        total: Tensor = yield Allreduce(flat32(gradient), last=True)
        if max_abs(total) == torch.inf:
            return None
        if self._saves(slot):
            self._stepped(slot, gradient)
        return Total(total)

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        values, residual, kept = self._accumulating(slot, gradient)
        payload = self._encoded(values, residual, kept, slot.workspace.room(self._whole_bytes(slot)))
        return self.framed(slot, gradient, payload, rate=1.0)

    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> list[Tensor | None]:
        values, residual, kept = self._accumulating(slot, gradient)
        return [
            self._encoded(values[start:stop], None if residual is None else residual[start:stop], kept[start:stop])
            for start, stop in cuts
        ]

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        return self._sum(payloads, divisor / (1 - self.momentum), out)

    def _sum(self, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).quantise_sum(payloads, 1, self.bucket_size, divisor, out))

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.bucket_size

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        return kernels.quantised_bytes(numel, 1, self.bucket_size)

    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        name = owned_key(slot.name, start)
        kept = slot.memory.room(name, total)
        payload = self._encoded(total, slot.memory.residual(name, total.device), kept)
        slot.memory.propose(name, kept)
        return payload

    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        return self._sum([payload], divisor, out)

    def _accumulating(self, slot: Slot, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """What is to be encoded, the residual, and room for the next one, which is proposed."""
        values, kept = self._stepped(slot, gradient), slot.memory.room(slot.name, gradient)
        slot.memory.propose(slot.name, kept)
        return values, slot.memory.residual(slot.name, kept.device), kept

    def _stepped(self, slot: Slot, gradient: Tensor) -> Tensor:
        """The new u, which is proposed; without momentum, the gradient."""
        values = flat(gradient)
        if not self.momentum:
            return values
        name = key(slot.name, MOMENTUM)
        velocity = momentum_of(slot, values, self.momentum, slot.memory.room(name, values))
        slot.memory.propose(name, velocity)
        return velocity

    def _encoded(
        self, values: Tensor, residual: Tensor | None, kept: Tensor, payload: Tensor | None = None
    ) -> Tensor | None:
        """Signs and means of values + residual, in `payload` or new memory; None for what is not finite."""
        if payload is None:
            length = kernels.quantised_bytes(values.numel(), 1, self.bucket_size)
            payload = torch.empty(length, dtype=torch.uint8)
        sent = kernels.of(values).sign_encode(values, residual, kept, self.bucket_size, payload)
        return None if sent == kernels.NOT_FINITE else payload

    def _whole_bytes(self, slot: Slot) -> int:
        """Of the payload of a gradient that is not cut."""
        return self.piece_bytes(slot, slot.parameter.numel, back=False)

    def _saves(self, slot: Slot) -> bool:
        return wire.frame_bytes(self._whole_bytes(slot)) < 4 * slot.parameter.numel

    def sent(self, slot: Slot) -> Sent:
        if not self.grouped(slot):
            return Sent(reduced=4 * slot.parameter.numel)
        return Sent(gathered=wire.frame_bytes(self._whole_bytes(slot)))

    def held(self, slot: Slot) -> dict[str, int]:
        """As after the warm-up."""
        if not self._saves(slot):
            return {}
        residual = 4 * slot.parameter.numel
        momentum = residual if self.momentum else 0
        frames = frame_room(self._whole_bytes(slot))
        return {RESIDUALS: residual, MOMENTUM: momentum, SPARE: residual + momentum, FRAMES: frames}

    def held_scattered(self, slot: Slot) -> dict[str, int]:
        owed = 4 * slot.parameter.numel // slot.step.size
        return added([self.held(slot), {RESIDUALS: owed, SPARE: owed}])

    def rate_of(self, slot: Slot) -> float | None:
        """The bits of this step; None where it sends gradients as they are."""
        return 1.0 if self.grouped(slot) else None

    def owed(self, slot: Slot, gradient: Tensor) -> Tensor:
        values = flat32(gradient)
        if not self.grouped(slot):
            return values
        if self.momentum:
            values = momentum_of(slot, values, self.momentum)
        return (1 - self.momentum) * slot.memory.compensate(slot.name, values)

    def conflict(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Momentum is of use to an optimizer alone that takes it for one."""
        takes: Any = getattr(optimizer, "takes_momentum_from", None)
        if not self.momentum or (takes is not None and takes(self)):
            return None
        return (
            f"{self} gives the momentum of gradients in their place, after {self.warmup_steps} steps, and "
            f"{type(optimizer).__name__} takes it for gradients. Give it momentum=0, or the optimizer "
            "hvd_compress.optim.OneBitAdam(..., compression=this compression)"
        )
