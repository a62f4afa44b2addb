"""The engine for transports that match collectives by their order, and the thread that keeps to it on every rank."""

from __future__ import annotations

import collections
import queue
import threading
import weakref
from collections.abc import Sequence

from .engine import Bucket, Engine, Ticket
from .transports.base import Transport

_CLOSING_SECONDS = 5.0
_LOOK_SECONDS = 5e-4  # between looks for answers while the next bucket is waited for


class OrderedEngine(Engine):
    """Runs buckets over a transport that matches collectives by their order, as MPI does.

    All ranks run their buckets one after another, in the order in which those of rank 0 became ready when they were
    first seen. A thread does so during backward; with `threaded` False they run at the flush.
    """

    def __init__(
        self,
        transport: Transport,
        plan: Sequence[Sequence[int]],
        prefix: str = "hvd_compress",
        *,
        threaded: bool = True,
    ) -> None:
        super().__init__(transport, plan, prefix)
        self._runner = _Runner(transport, threaded)
        # The thread must end before the interpreter does, and when nobody holds the engine any more.
        self.close = weakref.finalize(self, self._runner.close)  # type: ignore[method-assign]

    def poll(self) -> None:
        pass  # the runner advances the buckets

    def flush(self) -> None:
        super().flush()
        self._runner.flush()

    def _launch(self, bucket: Bucket) -> None:
        self._runner.launch(bucket)

    def _complete(self, ticket: Ticket) -> None:
        if (spans := self.telemetry.spans) is not None:
            spans.begin()
        try:
            while not ticket.done:
                if self._runner.failure:
                    raise self._runner.failure
                ticket.bucket.finished.wait(timeout=0.1)
        finally:
            if spans is not None:
                spans.end("exchange", ticket.bucket.key)


class _Interval:
    """What is launched between two flushes."""

    def __init__(self) -> None:
        self.launched: dict[str, Bucket] = {}  # in the order in which they became ready here
        self.flushed = False
        self.changed = threading.Condition()

    def add(self, bucket: Bucket) -> None:
        with self.changed:
            self.launched[bucket.key] = bucket
            self.changed.notify()

    def flush(self) -> None:
        with self.changed:
            self.flushed = True
            self.changed.notify()

    def wait_for(self, key: str | None, seconds: float | None) -> bool:
        """For the bucket `key`, or for the flush after which there will be none, at most so long; whether it came."""
        with self.changed:
            return self.changed.wait_for(lambda: key in self.launched or self.flushed, seconds)


class _Runner:
    """Runs the buckets of one interval after the other, in a thread or at the flush."""

    def __init__(self, transport: Transport, threaded: bool) -> None:
        self.failure: BaseException | None = None
        self._closed = False
        self._transport = transport
        self._order: list[str] = []
        self._interval = _Interval()
        self._queue: queue.SimpleQueue[_Interval | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="hvd_compress", daemon=True) if threaded else None
        if self._thread:
            self._queue.put(self._interval)
            self._thread.start()

    def launch(self, bucket: Bucket) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed: attach the compression to a transport again")
        self._interval.add(bucket)

    def flush(self) -> None:
        interval, self._interval = self._interval, _Interval()
        interval.flush()
        if self._thread:
            self._queue.put(self._interval)
        else:
            self._attempt(interval)

    def close(self) -> None:
        self._closed = True
        self._transport.leave()
        if self._thread:
            self._queue.put(None)
            self._interval.flush()
            if self._thread is threading.current_thread():  # the garbage collector runs in any
                return
            self._thread.join(_CLOSING_SECONDS)
            if self._thread.is_alive():  # in a collective that the other ranks will not join, or this one has left
                self._transport.abort()

    def _work(self) -> None:
        while self.failure is None and (interval := self._queue.get()) is not None:
            self._attempt(interval)

    def _attempt(self, interval: _Interval) -> None:
        try:
            self._run(interval)
        except BaseException as error:  # raised where the exchange is finished
            self.failure = error

    def _run(self, interval: _Interval) -> None:
        landing: collections.deque[Bucket] = collections.deque()
        for key in self._order:
            self._await(interval, key, landing)
            if bucket := interval.launched.pop(key, None):
                _post(bucket, landing)
        self._await(interval, None, landing)
        if rest := interval.launched:  # seen for the first time, on every rank alike
            for key in self._transport.broadcast_object(list(rest), root=0):
                _post(rest[key], landing)
                self._order.append(key)
        _land(landing)

    def _await(self, interval: _Interval, key: str | None, landing: collections.deque[Bucket]) -> None:
        """Wait for the bucket `key`, None for the flush; meanwhile take the answers of those that have been posted."""
        while not interval.wait_for(key, _LOOK_SECONDS if landing else None):
            landing[0].advance(block=False)
            if landing[0].finished.is_set():
                landing.popleft()


def _post(bucket: Bucket, landing: collections.deque[Bucket]) -> None:
    """Let the next bucket be posted at once where nothing of this one follows; else run it to its end."""
    bucket.post()
    landing.append(bucket)
    if not bucket.last:
        _land(landing)


def _land(landing: collections.deque[Bucket]) -> None:
    while landing:
        bucket = landing.popleft()
        while not bucket.finished.is_set():
            bucket.advance(block=True)
