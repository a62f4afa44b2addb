"""The frames of many gradients: made, found again in what ranks have sent, and added up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .. import kernels, wire
from ..compressors.codec import Codec, Common
from ..compressors.frames import add_up, unpack
from ..kernels.payloads import Payloads, starts_of
from ..requests import Total
from .base import Part


def encoded(
    codec: Codec, parts: Sequence[Part], common: Sequence[Common | None]
) -> tuple[list[wire.Frame], list[Tensor]]:
    """This rank's frames, and their bytes."""
    sent = [codec.frame(part.slot, part.gradient, known) for part, known in zip(parts, common)]
    return sent, [wire.pack(frame, part.slot.workspace.frame) for frame, part in zip(sent, parts)]


def added(
    codec: Codec, parts: Sequence[Part], sent: Sequence[wire.Frame], buffers: Sequence[Tensor]
) -> list[Total | None]:
    """The sums over the ranks of what their frames, one buffer a rank, say; None for what is not finite on some."""
    payloads, flags = _received(sent, parts, buffers)
    flagged = np.any(flags, axis=0).tolist()
    return [
        add_up(codec, part.slot, part.gradient, payloads[i], flags[:, i].tolist() if some else ())
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
