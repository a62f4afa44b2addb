"""Frames of one gradient: how much room there is, those that are sent dense, and the sum of all ranks'."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import kernels, wire
from ..requests import Total
from .gradients import max_abs
from .slot import Slot

if TYPE_CHECKING:
    from .codec import Codec


def most_room(numel: int) -> int:
    """Bytes that a payload may have so that its frame is no larger than `numel` float32 values."""
    return max(4 * numel - wire.HEADER_BYTES, 0)


def frame_room(payload_bytes: int) -> int:
    """What a workspace holds of it for the next step."""
    return wire.frame_bytes(payload_bytes) if payload_bytes else 0


def add_up(
    codec: Codec, slot: Slot, gradient: Tensor, payloads: Sequence[Tensor], flags: Sequence[int]
) -> Total | None:
    """The sum of what all ranks' payloads say, in rank order: float32 [numel], the same bits on all ranks.

    flags: of the payloads' frames. None when the gradient of any rank is not finite.
    """
    if any(flag & wire.NON_FINITE for flag in flags):
        return None
    out, divisor, add = slot.room_for_sum(gradient), slot.step.divisor, codec.add
    if any(flag & wire.DENSE for flag in flags):
        add = functools.partial(_add_some_dense, codec, flags, gradient.dtype)
    try:
        bound = kernels.on_host(lambda host: add(slot, payloads, divisor, host), out)
    except kernels.PayloadError as error:
        raise wire.WireError(error.rank, slot.name, "a payload that decodes", error) from error
    return Total(out, divisor, bound)


def _add_some_dense(
    codec: Codec,
    flags: Sequence[int],
    dtype: torch.dtype,
    slot: Slot,
    payloads: Sequence[Tensor],
    divisor: float,
    out: Tensor,
) -> float:
    """As `Codec.add`, where some payloads are the dense tensor."""
    out.zero_()
    one = torch.empty_like(out)
    for rank, (flag, payload) in enumerate(zip(flags, payloads)):
        try:
            if flag & wire.DENSE:
                one.copy_(decode_dense(payload, dtype, out.numel()))
            else:
                codec.add(slot, [payload], 1.0, one)
        except ValueError as error:
            raise kernels.PayloadError(rank, str(error)) from error
        out += one
    if divisor != 1:
        out /= divisor
    return max_abs(out)


def dense_room(gradient: Tensor) -> int:
    """Bytes that a payload may have so that its frame is no larger than the dense gradient; may be negative."""
    return (gradient.numel() * gradient.element_size() - wire.HEADER_BYTES) // 4 * 4


def encode_dense(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The payload of a dense frame, and the float32 values that its receivers will see."""
    cast = values.to(dtype)
    return cast.contiguous().view(-1).view(torch.uint8), cast.view(-1).to(torch.float32)


def decode_dense(payload: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    if payload.numel() != numel * dtype.itemsize:
        raise ValueError(f"{payload.numel()} bytes for {numel} dense elements of {dtype}")
    return payload.clone().view(dtype).to(torch.float32)  # a copy: float64 needs 8-byte alignment


def unpack(sent: wire.Frame, answers: Sequence[Tensor], slot: Slot) -> list[wire.Frame]:
    """The frames that all ranks sent where this one sent `sent`. Raises WireError for any other."""
    if len(answers) != slot.step.size:
        raise wire.WireError(len(answers), slot.name, f"frames of {slot.step.size} ranks", f"{len(answers)}")
    frames = [wire.unpack(answer, peer, slot.name) for peer, answer in enumerate(answers)]
    expected = slot.parameter.index, sent.algorithm, sent.dtype, sent.numel, wire.rounded(sent.rate)
    for peer, frame in enumerate(frames):
        found = frame.parameter, frame.algorithm, frame.dtype, frame.numel, frame.rate
        if frame.sender != peer or found != expected:
            raise _difference(peer, slot, (peer, *expected), (frame.sender, *found))
    return frames


_FIELDS = ("sender", "parameter index", "algorithm id", "dtype", "element count", "rate")


def _difference(peer: int, slot: Slot, expected: Sequence[object], found: Sequence[object]) -> wire.WireError:
    """What the first field of _FIELDS says that is not as expected."""
    what, wanted, got = next(three for three in zip(_FIELDS, expected, found) if three[1] != three[2])
    return wire.WireError(peer, slot.name, f"{what} {wanted}", got)
