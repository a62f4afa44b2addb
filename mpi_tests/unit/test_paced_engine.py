"""The engine for Horovod: what is posted after a gradient depends on what was handed in, never on answers' arrival."""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Any

import pytest
import torch

from hvd_compress import paced_engine
from hvd_compress.paced_engine import PacedEngine
from hvd_compress.requests import Allgather, Allreduce, Exchange
from hvd_compress.transports.base import Pending

from .test_engine import Recording, frame, gathers, scaled


class Late(Pending):
    """Answers only after it was asked so often."""

    def __init__(self, pending: Pending, polls: int) -> None:
        self._pending, self._polls = pending, polls

    def ready(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def wait(self) -> Any:
        return self._pending.wait()

    def await_ready(self, meanwhile: Any = None) -> None:
        while not self.ready():
            if meanwhile is not None:
                meanwhile()


class Dawdling(Recording):
    """A transport whose answers take a number of polls."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self.polls = polls

    def post(self, name: str, requests: Any) -> Pending:
        return Late(super().post(name, requests), self.polls)


def last(index: int) -> Exchange:
    yield Allreduce(torch.tensor([float(index)]))
    (answer,) = yield Allgather(frame(index).frame, last=True)
    assert answer is not None
    return torch.tensor([float(index)])


def posted_after_each(polls: int, exchange: Any, order: tuple[int, ...], steps: int = 3) -> list[list[str]]:
    """Names of what was posted by the time that each gradient was handed in, and at the flush, of the last step."""
    transport = Dawdling(polls)
    engine = PacedEngine(transport, [[3], [2], [1], [0]])
    engine.pace(True)
    for _ in range(steps):
        transport.posts.clear()
        seen, tickets = [], []
        for index in order:
            tickets.append(engine.submit(index, exchange(index)))
            seen.append([name for name, _ in transport.posts])
        engine.flush()
        seen.append([name for name, _ in transport.posts])
        assert [engine.finish(ticket).item() for ticket in tickets] == [float(index) for index in order]
        assert seen[-1] == [name for name, _ in transport.posts], "something was posted after the flush"
    return seen


@pytest.mark.parametrize("exchange", [scaled, last, gathers])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_what_is_posted_does_not_depend_on_when_answers_arrive(exchange, order):
    seen = [posted_after_each(polls, exchange, order) for polls in (0, 1, 7, 100)]
    assert all(other == seen[0] for other in seen[1:])


def test_later_rounds_leave_while_gradients_are_still_to_come():
    seen = posted_after_each(3, last, (3, 2, 1, 0))
    rounds = [[name.split(".")[1:3] for name in names] for names in seen]
    assert rounds[0] == [["0", "0"]]
    assert rounds[1] == [["0", "0"], ["1", "0"], ["0", "1"]]
    assert rounds[3] == [["0", "0"], ["1", "0"], ["0", "1"], ["2", "0"], ["1", "1"], ["3", "0"], ["2", "1"]]
    assert rounds[4][-1] == ["3", "1"]


def test_without_pace_later_rounds_wait_for_the_flush():
    transport = Dawdling(0)
    engine = PacedEngine(transport, [[3], [2], [1], [0]])
    tickets = [engine.submit(index, last(index)) for index in (3, 2, 1, 0)]
    assert len(transport.posts) == 4
    engine.flush()
    assert len(transport.posts) == 8
    assert [engine.finish(ticket).item() for ticket in tickets] == [3.0, 2.0, 1.0, 0.0]


def test_a_bucket_that_nobody_fills_holds_back_only_one_step():
    transport = Dawdling(2)
    engine = PacedEngine(transport, [[3], [2], [1], [0]])
    engine.pace(True)
    counts = []
    for _ in range(2):
        transport.posts.clear()
        tickets = [engine.submit(index, last(index)) for index in (3, 1, 0)]
        counts.append(len(transport.posts))
        for ticket in tickets:
            engine.finish(ticket)
    assert counts == [3, 5]


def test_answers_after_which_nothing_follows_are_taken_while_others_are_awaited():
    taken = []

    def watched(index: int) -> Exchange:
        yield Allgather(frame(index).frame, last=True)
        taken.append(index)
        return torch.zeros(1)

    transport = Dawdling(4)
    engine = PacedEngine(transport, [[2], [1], [0]])
    engine.pace(True)
    tickets = [engine.submit(2, watched(2)), engine.submit(1, last(1)), engine.submit(0, last(0))]
    assert taken == [2]
    for ticket in tickets:
        engine.finish(ticket)


def test_an_exchange_that_asks_on_after_its_last_request_is_told_so():
    def asks_on(index: int) -> Exchange:
        yield Allreduce(torch.zeros(1), last=True)
        yield Allreduce(torch.zeros(1), last=True)
        return None

    engine = PacedEngine(Dawdling(0), [[0]])
    with pytest.raises(RuntimeError, match="asks on after a request that it called its last"):
        engine.finish(engine.submit(0, asks_on(0)))


class Counting(Dawdling):
    """Counts what is posted and not yet taken."""

    def __init__(self) -> None:
        super().__init__(1)
        self.under_way = 0

    def post(self, name: str, requests: Any) -> Pending:
        self.under_way += 1
        pending = super().post(name, requests)
        wait = pending.wait

        def counted() -> Any:
            self.under_way -= 1
            return wait()

        pending.wait = counted  # type: ignore[method-assign]
        return pending


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("culprit", range(4))
def test_after_an_error_nothing_stays_posted_and_the_next_step_works(culprit, paced):
    def fails(index: int) -> Exchange:
        yield Allreduce(torch.zeros(1))
        raise ValueError(f"no {index}")

    transport = Counting()
    engine = PacedEngine(transport, [[3], [2], [1], [0]])
    engine.pace(paced)
    tickets = []
    with pytest.raises(ValueError, match=f"no {culprit}"):  # noqa: PT012
        for index in (3, 2, 1, 0):
            tickets.append(engine.submit(index, fails(index) if index == culprit else last(index)))
        engine.flush()
    assert transport.under_way == 0
    for ticket in tickets:
        if not ticket.done:
            with pytest.raises(ValueError, match=f"no {culprit}"):
                engine.finish(ticket)
    tickets = [engine.submit(index, last(index)) for index in (3, 2, 1, 0)]
    assert [engine.finish(ticket).item() for ticket in tickets] == [3.0, 2.0, 1.0, 0.0]


def test_a_wait_during_backward_that_lasts_tells_why_it_may_and_what_to_do(monkeypatch, caplog):
    monkeypatch.setattr(paced_engine, "_WARNING_SECONDS", 0.0)
    engine = PacedEngine(Dawdling(5), [[1], [0]])
    engine.pace(True)
    with caplog.at_level(logging.WARNING, logger="hvd_compress"):
        tickets = [engine.submit(index, last(index)) for index in (1, 0)]
        for ticket in tickets:
            engine.finish(ticket)
    (said,) = caplog.messages
    assert "overlap=False" in said
    assert "between backward() and step()" in said


class Meeting:
    """Where ranks in threads meet: the answer to a collective comes once all of them have posted it."""

    def __init__(self, size: int) -> None:
        self.size, self.changed = size, threading.Condition()
        self.posted: dict[str, int] = {}

    def post(self, name: str) -> None:
        with self.changed:
            self.posted[name] = self.posted.get(name, 0) + 1
            self.changed.notify_all()

    def complete(self, name: str) -> bool:
        return self.posted[name] == self.size


class OfThread(Recording):
    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        self.meeting = meeting

    def post(self, name: str, requests: Any) -> Pending:
        pending, meeting = super().post(name, requests), self.meeting
        meeting.post(name)

        class Met(Pending):
            def ready(self) -> bool:
                return meeting.complete(name)

            def wait(self) -> Any:
                self.await_ready()
                return pending.wait()

            def await_ready(self, meanwhile: Any = None) -> None:
                with meeting.changed:
                    assert meeting.changed.wait_for(lambda: meeting.complete(name), timeout=20), f"{name} hangs"

        return Met()


@pytest.mark.parametrize("orders", [((3, 2, 1, 0), (0, 1, 2, 3)), ((1, 3, 0, 2), (2, 0, 3, 1)), ((3, 2, 1, 0),) * 2])
def test_ranks_whose_gradients_arrive_in_different_orders_do_not_wait_for_each_other_in_a_circle(orders):
    meeting, failures = Meeting(2), []

    def train(order: tuple[int, ...]) -> None:
        try:
            engine = PacedEngine(OfThread(meeting), [[3], [2], [1], [0]])
            engine.pace(True)
            tickets = [engine.submit(index, last(index)) for index in order]
            for ticket in tickets:
                engine.finish(ticket)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(order,), daemon=True) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
