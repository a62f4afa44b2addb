"""The engine for transports that the program shares, as Horovod's: what is posted when depends on no answer's arrival.

Horovod names an operation without a name by a counter of all operations of the process. A program that posts one, such
as `hvd.allreduce(loss)`, finds its peers only if every rank has posted as many operations before it. So this engine
posts where all ranks pass alike: a bucket's first round when its last gradient is handed in, the next ones when later
buckets are complete, and what then is left at the flush. It waits there for the answers that it needs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from .engine import Bucket, Engine, Ticket
from .log import log
from .requests import Exchange, Member
from .transports.base import Transport

_WARNING_SECONDS = 60.0  # of waiting during backward
_ABANDON_SECONDS = 2.0  # for the answers to what all ranks have posted, after an error


class PacedEngine(Engine):
    """Runs buckets over a transport that matches collectives by name, as Horovod does.

    When the buckets from the first to one of them are complete, all those before it advance by a round. If gradients
    arrive in another order on some rank this still cannot deadlock: whoever waits has posted all that others wait for.
    It can if a rank lacks a gradient and calls a collective of its own before the flush; `pace(False)` leaves all later
    rounds to the flush.
    """

    def __init__(self, transport: Transport, plan: Sequence[Sequence[int]], prefix: str = "hvd_compress") -> None:
        super().__init__(transport, plan, prefix)
        self._paced = False
        self._order = list(range(len(plan)))  # numbers of the buckets that are expected between two flushes
        self._launched: dict[tuple[int, bool], Bucket] = {}  # since the last flush, by place
        self._complete_until = 0  # of _order, how many in a row are launched
        self._unfinished: list[Bucket] = []  # of these, those that have another round to post
        self._warned = False

    def pace(self, on: bool) -> None:
        """Whether later rounds are posted during backward; decided alike on all ranks, between two steps."""
        self._paced = on

    def submit(self, index: int, exchange: Exchange | Member) -> Ticket:
        try:
            return super().submit(index, exchange)
        except BaseException as error:
            self._abandon(error)
            raise

    def try_finish(self, ticket: Ticket, seconds: float) -> None:
        """Finish it if the other ranks take part within so many seconds."""
        deadline = time.monotonic() + seconds
        while not ticket.done and time.monotonic() < deadline:
            ticket.bucket.advance(block=False)
            time.sleep(1e-3)

    def confirm(self, ticket: Ticket) -> None:
        try:
            while not ticket.done:
                ticket.bucket.advance(block=True)
        except BaseException as error:
            self._abandon(error)
            raise

    def poll(self) -> None:
        """Post what is due, and take the answers that have arrived where nothing follows them."""
        if self._paced:
            self._keep_pace()
        self._take_last()

    def flush(self) -> None:
        """Send what has arrived since the last flush, and all later rounds of it; waits for the answers before them."""
        try:
            super().flush()
            first = None if self._first is None else self._first.bucket
            rest = sorted(self._launched.values(), key=lambda bucket: (bucket is not first, bucket.place))
            self._unfinished = [bucket for bucket in rest if not (bucket.last or bucket.finished.is_set())]
            while self._unfinished:
                self._advance_unfinished()
        except BaseException as error:
            self._abandon(error)
            raise
        if len(self._launched) > 1:  # not a measurement of the link alone
            self._order = sorted({number for number, _ in self._launched})
        self._start_interval()

    def _launch(self, bucket: Bucket) -> None:
        super()._launch(bucket)
        self._launched[bucket.place] = bucket

    def _complete(self, ticket: Ticket) -> None:
        try:
            super()._complete(ticket)
        except BaseException as error:
            self._abandon(error)
            raise

    def _keep_pace(self) -> None:
        while self._complete_until < len(self._order):
            bucket = self._launched.get((self._order[self._complete_until], False))
            if bucket is None:
                return
            self._advance_unfinished()
            self._complete_until += 1
            if not (bucket.last or bucket.finished.is_set()):
                self._unfinished.append(bucket)

    def _advance_unfinished(self) -> None:
        """One round of every bucket that has another one to post."""
        for bucket in self._unfinished:
            bucket.advance(block=True, meanwhile=functools.partial(self._while_waiting, time.monotonic()))
        self._unfinished = [b for b in self._unfinished if not (b.last or b.finished.is_set())]

    def _while_waiting(self, started: float) -> None:
        self._take_last()
        if not self._warned and time.monotonic() - started > _WARNING_SECONDS:
            self._warned = True
            log.warning(
                "rank %d has waited %.0f s for the other ranks' gradients. They may be slow; but if one of them has no "
                "gradient for some parameter, and calls a Horovod operation between backward() and step(), this lasts "
                "for ever: call it after optimizer.synchronize(), or give the compression overlap=False.",
                self.transport.rank,
                _WARNING_SECONDS,
            )

    def _take_last(self) -> None:
        if self._first is not None and not self._first.done:
            return
        for bucket in self._running:
            if bucket.last:
                bucket.advance(block=False)
        self._running = [bucket for bucket in self._running if not bucket.finished.is_set()]

    def _start_interval(self) -> None:
        self._launched, self._unfinished, self._complete_until = {}, [], 0

    def _abandon(self, error: BaseException) -> None:
        """After an error: leave nothing posted that the other ranks have posted as well."""
        deadline = time.monotonic() + _ABANDON_SECONDS
        for bucket in [*self._running, *self._open.values()]:
            bucket.abandon(error, deadline)
        self._running, self._first = [], None
        self._open.clear()
        self._arrived = {}
        self._start_interval()
