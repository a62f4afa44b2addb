"""What all ranks sent of one gradient: where their payloads lie, at no cost in Python for each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor


class Payloads(Sequence[Tensor]):
    """Views of the payloads in the ranks' buffers, uint8 [bytes], made only when they are asked for.

    addresses, lengths: int64 [ranks], of the payloads; the buffers must outlive this.
    """

    def __init__(self, buffers: Sequence[Tensor], starts: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> None:
        self._buffers, self._offsets = buffers, offsets
        self.addresses, self.lengths = starts + offsets, np.ascontiguousarray(lengths)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, rank: Any) -> Any:
        start = int(self._offsets[rank])
        return self._buffers[rank][start : start + int(self.lengths[rank])]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[rank] for rank in range(len(self)))


def starts_of(buffers: Sequence[Tensor]) -> np.ndarray:
    """Their addresses, int64 [ranks]."""
    return np.fromiter((buffer.data_ptr() for buffer in buffers), np.int64, len(buffers))
