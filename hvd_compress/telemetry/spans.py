"""Where the time of a thread goes: spans that interrupt one another, and the C++ kernels within them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

from ..kernels import native

KINDS = ("encode", "exchange", "decode", "python")


class Spans:
    """Seconds by kind, of the calls into this library; a span that begins inside another one interrupts it.

    encode: the algorithm, up to its last request, with the packing of frames. exchange: waiting for answers.
    decode: the algorithm, from its last answer. python: all else that the library does.
    kernels: the part of encode and decode that went by in C++ kernels.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*KINDS, "kernels"), 0.0)
        self.background = dict(self.seconds)  # of a thread that runs exchanges while the model is trained
        self.listener: Callable[[str, str, float, float], None] | None = None  # kind, bucket, beginning, end
        native.watch(_kernel_begins, _kernel_ends)

    def begin(self) -> None:
        now = perf_counter()
        if _thread.spans:
            _thread.spans[-1][0] += now - _thread.since
        _thread.spans.append([0.0, 0.0, now])
        _thread.since = now

    def end(self, kind: str, of: str = "") -> None:
        """End the span that began last; `kind` says what it was, `of` for which bucket."""
        now = perf_counter()
        own, kernels, began = _thread.spans.pop()
        if self.listener is not None:
            self.listener(kind, of, began, now)
        # What the user calls is "python" at first; only the thread begins with something else.
        seconds = self.seconds if _thread.spans or kind == "python" else self.background
        seconds[kind] += own + kernels + now - _thread.since
        if kind != "exchange":  # while simulated ranks wait, those of others run
            seconds["kernels"] += kernels
        _thread.since = now


class _Thread(threading.local):
    def __init__(self) -> None:
        self.spans: list[
            list[float]
        ] = []  # that are open: seconds of each outside and inside kernels, and its beginning
        self.since = 0.0  # when the last one of them was left or taken up


_thread = _Thread()


def _kernel_begins() -> None:
    if _thread.spans:
        now = perf_counter()
        _thread.spans[-1][0] += now - _thread.since
        _thread.since = now


def _kernel_ends() -> None:
    if _thread.spans:
        now = perf_counter()
        _thread.spans[-1][1] += now - _thread.since
        _thread.since = now
