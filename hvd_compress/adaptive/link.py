"""How fast the job's own transport is, measured by all ranks together."""

from __future__ import annotations

import time
from collections import deque

import torch

from .. import wire
from ..requests import Allgather, Allreduce, Exchange, Request
from .costs import TimeCost

_SIZES = (1 << 10, 1 << 14, 1 << 18)  # bytes
_REPEATS = 5  # and one before them: the ranks come to it at different times, and find gradients under way
_KEPT = 3 * len(_SIZES) * _REPEATS  # samples: those of the last three measurements
_ALGORITHM = 255  # in the frames, which nobody decodes


class Link:
    """Samples of (bytes, seconds) of the collective that carries the gradients, and the line through them."""

    def __init__(self, *, gathers: bool) -> None:
        self._gathers = gathers
        self.samples: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def measure(self, rank: int) -> Exchange:
        """An exchange that takes samples: transfers of all sizes in turn, each once the one before has ended."""
        for repeat in range(_REPEATS + 1):
            for size in _SIZES:
                request = self._request(size, rank)
                start = time.perf_counter()
                yield request
                if repeat:
                    self.samples.append((size, time.perf_counter() - start))
        return None

    def fit(self) -> TimeCost:
        return TimeCost.fit(self.samples)

    def _request(self, size: int, rank: int) -> Request:
        if not self._gathers:
            return Allreduce(torch.zeros(size // 4))
        payload = torch.zeros(size - wire.HEADER_BYTES, dtype=torch.uint8)
        return Allgather(wire.pack(wire.Frame(_ALGORITHM, torch.float32, rank, 0, 0.0, 0, payload)))
