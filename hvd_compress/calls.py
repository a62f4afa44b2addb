"""Whose methods are among the calls under way: for callers that do not introduce themselves, as Horovod's optimizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType


def callers() -> Iterator[object]:
    """What the calls under way have as `self`, the nearest first; None for those that have nothing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back
