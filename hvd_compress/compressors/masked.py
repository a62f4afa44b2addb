"""Masked exchange: where weights are pruned, as by AC/DC (arXiv 2106.12379), only gradients of kept ones travel.

All ranks know the masks, so that no index is sent, and what is sent can be added up by Horovod itself.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import wire
from ..memory import POSITIONS
from ..requests import Allgather, Allreduce, Exchange, Total
from .base import Compressor, SummedCompressor
from .footprint import Sent
from .frames import unpack
from .gradients import flat32, max_abs, narrowed, widened
from .slot import Slot

_MASK = "the mask of "


class MaskSource(Protocol):
    """Who decides which weights are kept: training.ACDC, or training.Masks for masks of your own."""

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bool by parameter name, True where a weight is kept; parameters without one are dense."""

    @property
    def version(self) -> int:
        """Another number when the masks have changed."""


class MaskError(RuntimeError):
    """Some ranks have another mask than the others. Names the parameter and these ranks."""

    def __init__(self, parameter: str, ranks: list[int], size: int) -> None:
        super().__init__(
            f"the mask of {parameter!r} on rank {', '.join(map(str, ranks))} is not that of the other of {size} ranks: "
            "their gradients cannot be added up. Give every rank the same masks, between the same two steps; where "
            "they come of the weights, broadcast these first."
        )
        self.parameter, self.ranks = parameter, ranks


@dataclass(frozen=True)
class MaskedCompressor(Compressor):
    """Sends the values of kept weights alone, as they are; and by `dense`, what has no mask in this step.

    masks: who decides which weights are kept, or a function that returns it, for one that is made later.
    dense: any compressor without momentum of its own. What it still owes in its residual is sent with the first
        gradient under a mask, where weights are kept, and dropped where they are pruned.

    Masks must change on all ranks between the same two steps. In the first exchange after that, ranks compare them.
    """

    masks: MaskSource | Callable[[], MaskSource]
    dense: Compressor

    algorithm = 11
    takes_all = True

    def __post_init__(self) -> None:
        if isinstance(self.dense, MaskedCompressor) or self.dense.keeps_momentum:
            raise ValueError(
                f"dense={self.dense} must be a compressor without masks and without momentum of its own, which would "
                "stop under a mask"
            )

    def switched_off(self, plain: Compressor) -> Compressor:
        """What is kept travels as it is already."""
        return dataclasses.replace(self, dense=self.dense.switched_off(plain))

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.dense.stateful

    def options(self) -> dict[str, Any]:
        of_dense = {f"dense.{name}": value for name, value in self.dense.options().items()}
        return {"masks": type(self.masks).__name__, "dense": type(self.dense).__name__} | of_dense

    def chosen(self, slot: Slot) -> Compressor | None:
        known = self._known(slot, slot.step.number)
        usual = known.kept or self.dense.chosen(slot)
        return _Compared(known, usual) if known.step == slot.step.number else usual

    @property
    def _source(self) -> MaskSource:
        return self.masks() if callable(self.masks) else self.masks

    def _known(self, slot: Slot, step: int) -> _Known:
        source = self._source
        mask, known = source.masks.get(slot.name), slot.cache
        if known is None or known.version != source.version or known.mask is not mask:
            known = slot.cache = _Known(source.version, mask, step, None if mask is None else _kept(mask, slot))
        return known

    varies = True

    def terms(self, slots: Sequence[Slot], step: int) -> Mapping[str, str]:
        """Which masks are new in `step`, and the schedules of `dense`."""
        new = [slot.name for slot in slots if self._known(slot, step).step == step]
        new.sort(key=lambda name: name not in self._source.masks)  # those that have one are named first
        return {**{f"{_MASK}{name}": "changed" for name in new}, **super().terms(slots, step)}

    def disagreement(self, what: str, ranks_by_state: Mapping[str, Sequence[int]], size: int) -> Exception | None:
        if not what.startswith(_MASK):
            return None
        _, unusual = ranks_by_state.values()
        return MaskError(what[len(_MASK) :], list(unusual), size)

    def sent(self, slot: Slot) -> Sent | None:
        if (mask := self._mask_of(slot)) is not None:
            return Sent(reduced=4 * max(int(mask.count_nonzero()), 1))
        usual = self.dense.chosen(slot)
        return usual.sent(slot) if usual else Sent(reduced=4 * slot.parameter.numel)

    def held(self, slot: Slot) -> dict[str, int]:
        if (mask := self._mask_of(slot)) is not None:
            return {POSITIONS: 8 * int(mask.count_nonzero())}
        usual = self.dense.chosen(slot)
        return usual.held(slot) if usual else {}

    def cached(self, slot: Slot) -> Sequence[Tensor]:
        kept = slot.cache.kept if slot.cache else None
        return [kept.positions] if kept else []

    def _mask_of(self, slot: Slot) -> Tensor | None:
        return self._source.masks.get(slot.name)

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        raise AssertionError("only what is chosen exchanges")


@dataclass(frozen=True, eq=False)
class KeptCompressor(SummedCompressor):
    """The values at these positions, int64, ascending; zeros elsewhere."""

    positions: Tensor

    algorithm = 11

    def summand(self, gradient: Tensor, size: int = 1) -> Tensor:
        """At least one value, which is NaN if any of the gradient is not finite, kept or not."""
        values = gradient.detach().reshape(-1)
        sent = values[self.positions.to(values.device)] if self.positions.numel() else values.new_zeros(1)
        sent = sent.float() if sent.dtype == torch.bfloat16 else sent  # which Horovod and MPI can add
        sent[0] += values.sum(dtype=torch.float64) * 0
        return narrowed(sent, size) if sent.dtype == torch.float16 else sent

    def restore(self, total: Tensor, shape: torch.Size, dtype: torch.dtype, size: int = 1) -> Tensor:
        total = widened(total, size)
        if not self.positions.numel():
            return (total[0] * 0).to(dtype).expand(shape).clone()
        dense = torch.zeros(shape.numel(), dtype=dtype, device=total.device)
        return dense.index_copy_(0, self.positions.to(total.device), total.to(dtype)).view(shape)

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        total: Tensor = yield Allreduce(self.summand(gradient, slot.step.size), last=True)
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        return Total(self.restore(total, gradient.shape, dtype, slot.step.size).view(-1))


@dataclass(frozen=True, eq=False)
class _Known:
    """What a slot has found out of a mask, and in which step."""

    version: int
    mask: Tensor | None
    step: int
    kept: KeptCompressor | None


@dataclass(frozen=True, eq=False)
class _Compared(Compressor):
    """The first exchange under a mask, or without one: like any other once the ranks know that theirs are equal."""

    known: _Known
    usual: Compressor | None

    algorithm = 11

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        payload = torch.frombuffer(bytearray(digest(self.known.mask)), dtype=torch.uint8)
        sent = wire.Frame(11, gradient.dtype, slot.step.rank, slot.parameter.index, 0.0, gradient.numel(), payload)
        answers: list[Tensor] = yield Allgather(wire.pack(sent))
        compare(slot, [frame.payload.numpy().tobytes() for frame in unpack(sent, answers, slot)])
        if self.known.kept:
            return (yield from self._first(self.known.kept, slot, gradient))
        if self.usual:
            return (yield from self.usual.exchange(slot, gradient))
        total: Tensor = yield Allreduce(gradient if gradient.dtype == torch.float64 else flat32(gradient), last=True)
        return Total(total.view(-1))

    def rate_of(self, slot: Slot) -> float | None:
        return self.usual.rate_of(slot) if self.usual else None

    def owed(self, slot: Slot, gradient: Tensor) -> Tensor:
        if self.known.kept:  # sends what `dense` has left in its residual as well
            return slot.memory.compensate(slot.name, flat32(gradient))
        return self.usual.owed(slot, gradient) if self.usual else gradient.detach().reshape(-1)

    def _first(self, kept: KeptCompressor, slot: Slot, gradient: Tensor) -> Exchange:
        total: Tensor = yield Allreduce(kept.summand(slot.memory.compensate(slot.name, flat32(gradient))), last=True)
        if max_abs(total) == math.inf:
            return None
        if slot.name in slot.memory.residuals:
            slot.memory.propose(slot.name, torch.zeros(gradient.numel(), device=gradient.device))
        return Total(kept.restore(total, gradient.shape, torch.float32).view(-1))


def _kept(mask: Tensor, slot: Slot) -> KeptCompressor:
    if mask.dtype != torch.bool or mask.shape != slot.parameter.shape:
        raise ValueError(
            f"the mask of {slot.name!r} must be bool of shape {tuple(slot.parameter.shape)}: {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return KeptCompressor(torch.nonzero(mask.reshape(-1)).view(-1))


def digest(mask: Tensor | None) -> bytes:
    """16 bytes that tell masks of one shape apart, and none from any."""
    return hashlib.sha256(b"" if mask is None else np.packbits(mask.cpu().numpy()).tobytes()).digest()[:16]


def compare(slot: Slot, digests: list[bytes]) -> None:
    """Raise MaskError if the ranks' digests differ; it names those that are not like most, or not like rank 0."""
    (usual, _), *others = collections.Counter(digests).most_common()
    if others:
        raise MaskError(slot.name, [rank for rank, mine in enumerate(digests) if mine != usual], slot.step.size)
