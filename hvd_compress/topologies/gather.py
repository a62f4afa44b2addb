"""Everyone sends to everyone: each rank receives the frames of all others and adds them up itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..compressors.codec import Codec
from ..requests import AllgatherParts, GroupExchange
from .base import Part, agreed
from .frames import added, encoded


@dataclass(frozen=True)
class Gather:
    """Exact but for what the codec loses; a rank of N receives N - 1 times what it sends. Right for few ranks, and for
    what cannot be cut."""

    codec: Codec

    def reduce(self, parts: Sequence[Part]) -> GroupExchange:
        common = yield from agreed(self.codec, parts)
        sent, frames = encoded(self.codec, parts, common)
        buffers: list[Tensor] = yield AllgatherParts(frames, [frame.numel() for frame in frames], last=True)
        return added(self.codec, parts, sent, buffers)
