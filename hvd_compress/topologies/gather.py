"""Everyone sends to everyone: each rank receives the frames of all others and adds them up itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .. import kernels, wire
from ..compressors.base import Codec, add_up, unpack
from ..kernels.payloads import Payloads, starts_of
from ..requests import AllgatherParts, GroupExchange
from .base import Part, agreed


@dataclass(frozen=True)
class Gather:
    """Exact but for what the codec loses; a rank of N receives N - 1 times what it sends. Right for few ranks, and for
    what cannot be cut."""

    codec: Codec

    def reduce(self, parts: Sequence[Part]) -> GroupExchange:
        common = yield from agreed(self.codec, parts)
        sent = [self.codec.frame(part.slot, part.gradient, known) for part, known in zip(parts, common)]
        frames = [wire.pack(frame, part.slot.frame) for frame, part in zip(sent, parts)]
        buffers: list[Tensor] = yield AllgatherParts(frames, [frame.numel() for frame in frames], last=True)
        payloads, flags = _received(sent, parts, buffers)
        flagged = np.any(flags, axis=0).tolist()
        return [
            add_up(self.codec, part.slot, part.gradient, payloads[i], flags[:, i].tolist() if some else ())
            for i, (part, some) in enumerate(zip(parts, flagged))
        ]


def _received(
    sent: Sequence[wire.Frame], parts: Sequence[Part], buffers: Sequence[Tensor]
) -> tuple[list[Payloads], np.ndarray]:
    """All ranks' payloads of each gradient, and the flags of the frames, uint8 [ranks, gradients].

    Raises WireError for frames that are damaged, or are not of these gradients.
    """
    starts = starts_of(buffers)
    found = kernels.find_frames(buffers, starts, b"".join(map(wire.header, sent)), len(sent))
    if found is None:
        found = _examined(sent, parts, buffers)
    offsets, lengths, flags = found
    return [Payloads(buffers, starts, offsets[:, i], lengths[:, i]) for i in range(len(sent))], flags


def _examined(
    sent: Sequence[wire.Frame], parts: Sequence[Part], buffers: Sequence[Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As kernels.find_frames, one by one, so that an error can tell what is wrong with which."""
    by_rank = [wire.split(buffer, len(sent), peer) for peer, buffer in enumerate(buffers)]
    frames = [unpack(frame, of_all, part.slot) for frame, part, of_all in zip(sent, parts, zip(*by_rank))]
    lengths = np.array([[frame.payload.numel() for frame in of_all] for of_all in frames]).T
    flags = np.array([[frame.flags for frame in of_all] for of_all in frames], np.uint8).T
    whole = np.array([[frame.numel() for frame in of_rank] for of_rank in by_rank])
    return whole.cumsum(axis=1) - whole + wire.HEADER_BYTES, lengths, flags
