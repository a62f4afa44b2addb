"""Runs exchanges: starts them as gradients arrive, advances them when answers do, finishes them when asked.

Parameters are cut into buckets in reverse order, which is about the order in which gradients become ready. The
exchanges of a bucket advance round by round, and their requests of a kind travel as one collective. What travels with
what depends only on the parameters that arrive between two flushes, which is the same on every rank, never on the order
in which they arrive, which is not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .requests import Allreduce, Broadcast, Exchange, GroupExchange, Member, Request, Topology, sent_bytes
from .telemetry import Collective, Telemetry
from .transports.base import Pending, Transport

_ABANDON_POLL_SECONDS = 1e-3


class Ticket:
    """One gradient's part in an exchange under way."""

    def __init__(self, index: int, bucket: Bucket) -> None:
        self.index = index
        self.bucket = bucket
        self.sent_bytes = 0
        self.result: Any = None  # of a gradient a Total, or None where it is not finite on some rank
        self.done = False


class Run:
    """An exchange under way, of one gradient or of a group."""

    def __init__(
        self, tickets: Sequence[Ticket], exchange: Exchange | GroupExchange, bucket: Bucket, group: int | None
    ):
        self.tickets = tickets
        self.request: Request | None = None
        self.done = False
        self._exchange = exchange
        self._bucket = bucket
        self._group = group  # its number in the bucket
        self.advance(None)

    @property
    def kind(self) -> str:
        """What runs must share for their requests to travel as one collective; those of a group travel alone."""
        assert self.request is not None
        return _kind(self.request) + ("" if self._group is None else f".{self._group}")

    def advance(self, answer: Any) -> None:
        """Resume the exchange with `answer`, up to its next request or its end."""
        if (spans := self._bucket.telemetry.spans) is not None:
            spans.begin()
        try:
            self.request = self._exchange.send(answer)
        except StopIteration as end:
            results = [end.value] if self._group is None else end.value
            for ticket, result in zip(self.tickets, results):
                ticket.result, ticket.done = result, True
            self.request, self.done = None, True
        finally:
            if spans is not None:
                spans.end("decode" if self.done else "encode", self._bucket.key)

    def count(self) -> int:
        """Note what the request sends as sent by the gradients; returns how much that is in bytes."""
        assert self.request is not None
        size = sent_bytes(self.request)
        shares = getattr(self.request, "shares", None) or _shared_out(size, len(self.tickets))
        for ticket, share in zip(self.tickets, shares):
            ticket.sent_bytes += share
        return size


class Bucket:
    """Exchanges that travel together, round by round."""

    def __init__(self, key: str, place: tuple[int, bool], transport: Transport, telemetry: Telemetry) -> None:
        self.key = key
        self.place = place  # among the buckets, the same on every rank: number, and whether it is a late one
        self.telemetry = telemetry
        self.tickets: dict[int, Ticket] = {}
        self.runs: list[Run] = []
        self._members: dict[int, Member] = {}  # that wait for `start`
        self.finished = threading.Event()
        self.last = False  # whether the round under way is the last one
        self._transport = transport
        self._round = 0
        self._failure: BaseException | None = None
        self._pending: list[_Posted] = []

    def add(self, index: int, exchange: Exchange | Member) -> Ticket:
        """Take in one gradient; what is not exchanged by itself waits for `start`."""
        ticket = self.tickets[index] = Ticket(index, self)
        if isinstance(exchange, Member):
            self._members[index] = exchange
        else:
            self.runs.append(Run([ticket], exchange, self, None))
        return ticket

    def start(self) -> None:
        """All gradients are in: begin the exchanges of groups."""
        groups: dict[Topology, list[int]] = {}
        for index in sorted(self._members):
            groups.setdefault(self._members[index].topology, []).append(index)
        for number, (topology, indices) in enumerate(groups.items()):
            exchange = topology.reduce([self._members[index].part for index in indices])
            self.runs.append(Run([self.tickets[index] for index in indices], exchange, self, number))
        self._members.clear()
        self.runs.sort(key=lambda run: run.tickets[0].index)

    def post(self) -> None:
        """Send the waiting requests, those of a kind as one collective; at the end of the last round, finish."""
        kinds: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.request is not None:
                kinds.setdefault(run.kind, []).append(run)
        self._pending = []
        self.last = all(run.request.last for runs in kinds.values() for run in runs)  # type: ignore[union-attr]
        for kind in sorted(kinds):  # one order on every rank
            size = sum(run.count() for run in kinds[kind])
            requests = [run.request for run in kinds[kind] if run.request is not None]
            now = time.perf_counter()
            name = f"{self.key}.{self._round}.{kind}"
            pending = self._transport.post(name, requests)
            self._pending.append(_Posted(name, _kind(requests[0]), kinds[kind], pending, size, now))
        self._round += 1
        if not self._pending:
            self.tickets.clear()  # they hold gradients, and this bucket: the garbage collector would come late
            self.runs.clear()
            self.finished.set()

    def advance(self, *, block: bool, meanwhile: Callable[[], None] | None = None) -> None:
        """Take the answers of this round and post the next, if they are there or once they are.

        meanwhile: called again and again while it waits.
        """
        if self._failure:
            raise self._failure
        if not self._pending:
            return
        ready = all(posted.pending.ready() for posted in self._pending)
        if not (block or ready):
            return
        try:
            if not ready:
                self._wait(meanwhile)
            pending, self._pending, last = self._pending, [], self.last  # handles can be waited for once
            answered = [(posted.runs, posted.take(self.telemetry, waited=not ready)) for posted in pending]
            for runs, answers in answered:
                for run, answer in zip(runs, answers):
                    run.advance(answer)
            if last and not all(run.done for run in self.runs):
                raise RuntimeError(f"an exchange of bucket {self.key} asks on after a request that it called its last")
            self.post()
        except BaseException as error:  # stays the error of all who ask for a gradient of this bucket
            self._failure = error
            raise

    def abandon(self, error: BaseException, deadline: float) -> None:
        """Give up: take the answers of what is posted, so that nothing stays on the way, and raise `error` from now on.

        deadline: of time.monotonic(); other ranks may never post what this one did.
        """
        pending, self._pending = self._pending, []
        self._failure = self._failure or error
        for posted in pending:
            while not posted.pending.ready():
                if time.monotonic() > deadline:
                    return
                time.sleep(_ABANDON_POLL_SECONDS)
            with contextlib.suppress(Exception):  # what is wrong with it does not matter any more
                posted.pending.wait()

    def _wait(self, meanwhile: Callable[[], None] | None) -> None:
        if (spans := self.telemetry.spans) is not None:
            spans.begin()
        try:
            for posted in self._pending:
                posted.pending.await_ready(meanwhile)
        finally:
            if spans is not None:
                spans.end("exchange", self.key)


@dataclass(frozen=True)
class _Posted:
    """A collective under way, for the requests of these exchanges."""

    name: str
    kind: str
    runs: Sequence[Run]
    pending: Pending
    sent_bytes: int
    since: float

    def take(self, telemetry: Telemetry, *, waited: bool) -> Sequence[Any]:
        now = time.perf_counter()
        telemetry.collectives.append(Collective(self.kind, self.sent_bytes, now - self.since, waited))
        if telemetry.trace is not None:
            telemetry.trace.collective(self.name, self.kind, self.sent_bytes, self.since, now)
        answers: Sequence[Any] = self.pending.wait()
        return answers


class Engine:
    """Runs buckets over a transport that matches collectives by name, in whatever order they are posted.

    plan: the parameters' indices, cut into buckets; the same on every rank.
    """

    def __init__(self, transport: Transport, plan: Sequence[Sequence[int]], prefix: str = "hvd_compress") -> None:
        self.transport = transport
        self.telemetry = Telemetry()  # until it is given another one
        self._prefix = prefix
        self._bucket_of = {index: number for number, members in enumerate(plan) for index in members}
        # Whom a bucket waits for before it goes: those that came the last time that any did.
        self._expected = {number: set(members) for number, members in enumerate(plan)}
        self._arrived: dict[int, set[int]] = {}  # since the last flush
        self._open: dict[str, Bucket] = {}
        self._first: Ticket | None = None  # to be done before all others
        self._running: list[Bucket] = []

    def submit(self, index: int, exchange: Exchange | Member) -> Ticket:
        """Start the exchange of parameter `index`, or of its group once all of that are there."""
        number = self._bucket_of[index]
        arrived = self._arrived.setdefault(number, set())
        if index in arrived:
            raise RuntimeError(f"parameter {index} was handed in twice before its gradient was synchronized")
        late = index not in self._expected[number]  # travels in a bucket of its own, sent at the flush
        key = f"{self._prefix}.{number}{'.late' if late else ''}"
        if (bucket := self._open.get(key)) is None:
            bucket = self._open[key] = Bucket(key, (number, late), self.transport, self.telemetry)
        ticket = bucket.add(index, exchange)
        arrived.add(index)
        if not late and bucket.tickets.keys() == self._expected[number]:
            self._open.pop(key)
            bucket.start()
            self._launch(bucket)
        self.poll()
        return ticket

    def put_first(self, ticket: Ticket) -> None:
        """Take no other answer before this exchange is done: it knows better what is wrong."""
        self._first = ticket

    def confirm(self, ticket: Ticket) -> None:
        """Put it first, and wait for it before anything else is posted, where this engine can."""
        self.put_first(ticket)

    @property
    def collecting(self) -> bool:
        """Whether anything was submitted since the last flush."""
        return bool(self._arrived)

    def poll(self) -> None:
        """Advance what can be advanced without waiting."""
        if self._first is not None and not self._first.done:
            self._first.bucket.advance(block=False)
            if not self._first.done:
                return
        for bucket in self._running:
            bucket.advance(block=False)
        self._running = [bucket for bucket in self._running if not bucket.finished.is_set()]

    def flush(self) -> None:
        """Send what has arrived since the last flush and waits for company."""
        if (spans := self.telemetry.spans) is not None:
            spans.begin()
        for bucket in sorted(self._open.values(), key=lambda bucket: bucket.place):
            bucket.start()
            self._launch(bucket)
        self._open.clear()
        self._expected.update(self._arrived)
        self._arrived = {}
        if spans is not None:
            spans.end("python")

    def finish(self, ticket: Ticket) -> Any:
        """Wait for what its exchange returns; see requests.Exchange."""
        if self.collecting:
            self.flush()
        self._complete(ticket)
        if ticket is self._first:
            self._first = None
        return ticket.result

    def close(self) -> None:
        """Let go of what runs in the background."""

    def _launch(self, bucket: Bucket) -> None:
        bucket.post()
        self._running.append(bucket)

    def _complete(self, ticket: Ticket) -> None:
        while not ticket.done:
            self.poll()
            ticket.bucket.advance(block=True)


def cut(sizes: dict[int, int], bucket_bytes: int) -> list[list[int]]:
    """Cut parameters, {index: bytes}, into buckets of about `bucket_bytes`, the last parameter first."""
    plan: list[list[int]] = []
    filled = 0
    for index in sorted(sizes, reverse=True):
        if not plan or filled + sizes[index] > bucket_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(index)
        filled += sizes[index]
    return plan


def _kind(request: Request) -> str:
    """What requests must share to travel as one collective. The device's index, which differs by rank, is no part."""
    if isinstance(request, Allreduce):
        return f"allreduce.{request.op.value}.{request.tensor.dtype}.{request.tensor.device.type}"
    if isinstance(request, Broadcast):
        return f"broadcast.{request.root}.{request.tensor.dtype}.{request.tensor.device.type}"
    return type(request).__name__.lower().removesuffix("parts")


def _shared_out(size: int, count: int) -> list[int]:
    """`size` in `count` parts that are as equal as can be."""
    return [(size * (number + 1)) // count - (size * number) // count for number in range(count)]
