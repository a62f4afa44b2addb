"""The engine for MPI: every rank follows the order of rank 0, whatever its own."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import pytest
import torch

from hvd_compress import wire
from hvd_compress.compressors import Compressor, Step
from hvd_compress.engine import Engine, Ticket
from hvd_compress.ordered_engine import OrderedEngine
from hvd_compress.requests import Allgather, Allreduce, Exchange, ReduceOp
from hvd_compress.transports.base import Pending, Transport

from .drive import FRAMED, SUMMED, bits, bound, run, slot_of
from .drive import random as gradient_like

_PATIENCE_SECONDS = 10.0
_OPS = {ReduceOp.SUM: torch.add, ReduceOp.MAX: torch.maximum, ReduceOp.MIN: torch.minimum}


class Rendezvous:
    """Matches collectives by their order, as MPI does, and minds when ranks do not post the same ones."""

    def __init__(self, size: int, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.size = size
        self.delay = delay
        self.changed = threading.Condition()
        self.posted: list[dict[int, tuple[str, Any]]] = []
        self.closed = False
        self.transports = [Ordered(self, rank) for rank in range(size)]

    @property
    def names(self) -> list[str]:
        return [next(iter(posted.values()))[0] for posted in self.posted]


class Waiting(Pending):
    def __init__(self, world: Rendezvous, number: int, combine: Callable[[list[Any]], Any]) -> None:
        self._world, self._number, self._combine = world, number, combine

    def ready(self) -> bool:
        return len(self._world.posted[self._number]) == self._world.size

    def wait(self) -> Any:
        with self._world.changed:
            if not self._world.changed.wait_for(lambda: self.ready() or self._world.closed, _PATIENCE_SECONDS):
                raise TimeoutError(f"collective {self._number}: only {self._world.posted[self._number]}")
            if not self.ready():
                raise RuntimeError("aborted")
        by_rank = self._world.posted[self._number]
        if len({name for name, _ in by_rank.values()}) != 1:
            raise AssertionError(f"collective {self._number} is {[by_rank[r][0] for r in sorted(by_rank)]}")
        return self._combine([by_rank[rank][1] for rank in range(self._world.size)])


class Ordered(Transport):
    def __init__(self, world: Rendezvous, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self.count = 0
        self.aborted = False
        self.threads: set[int] = set()
        self.fail_at: int | None = None

    def _post(self, name: str, value: Any, combine: Callable[[list[Any]], Any]) -> Pending:
        time.sleep(self.world.delay())
        if self.count == self.fail_at:
            raise ConnectionError("the network is down")
        with self.world.changed:
            while len(self.world.posted) <= self.count:
                self.world.posted.append({})
            self.world.posted[self.count][self.rank] = name, value
            self.world.changed.notify_all()
        self.count += 1
        self.threads.add(threading.get_ident())
        return Waiting(self.world, self.count - 1, combine)

    def allreduce(self, name: str, tensor: torch.Tensor, op: ReduceOp) -> Pending:
        return self._post(name, tensor, lambda tensors: reduce(_OPS[op], tensors).clone())

    def allgather(self, name: str, parts: Sequence[torch.Tensor]) -> Pending:
        return self._post(name, torch.cat(list(parts)), list)

    def broadcast(self, name: str, tensor: torch.Tensor, root: int) -> Pending:
        return self._post(name, tensor, lambda tensors: tensors[root].clone())

    def alltoall(self, name: str, parts: Sequence[Sequence[torch.Tensor]]) -> Pending:
        buffers = [torch.cat(list(destination)) for destination in parts]
        return self._post(name, buffers, lambda sent: [source[self.rank] for source in sent])

    def abort(self) -> None:
        self.aborted = True
        with self.world.changed:
            self.world.closed = True
            self.world.changed.notify_all()


def on_all(count: int, work: Callable[[int], Any], patience_seconds: float = 2 * _PATIENCE_SECONDS) -> list[Any]:
    """work(rank) in a thread a rank; raises what any of them raised."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def of_rank(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=of_rank, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience_seconds)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(count)]


def gathers(index: int, rank: int = 0) -> Exchange:
    frame = wire.Frame(1, torch.float32, rank, index, 0.0, 1, torch.zeros(4 * rank, dtype=torch.uint8))
    frames = yield Allgather(wire.pack(frame))
    assert [wire.unpack(found, peer).parameter for peer, found in enumerate(frames)] == [index] * len(frames)
    return torch.tensor([float(index)])


PLAN = [[7, 6], [5, 4], [3], [2, 1, 0]]
SHAPES = [(11 + index, 30) for index in range(8)]


def gradient(index: int, rank: int, step: int) -> torch.Tensor:
    return gradient_like(*SHAPES[index], seed=1000 * step + 10 * index + rank)


def arrivals(step: int, rank: int) -> list[int]:
    """In another order on every rank; in steps 2 and 3 some stay away, and return."""
    indices = [index for index in range(8) if step not in (2, 3) or index not in (1, 3, 6)]
    random.Random(100 * step + rank).shuffle(indices)
    return indices


def exchanged(engine_of: Callable[[int], Engine], compressor: Compressor, rank: int) -> list[dict[int, bytes]]:
    engine = engine_of(rank)
    slots = [slot_of(SHAPES[index], f"p{index}", index) for index in range(8)]
    totals = []
    for step in range(6):
        tickets = {}
        for index in arrivals(step, rank):
            slots[index].step = Step(step, rank, engine.transport.size)
            tickets[index] = engine.submit(index, compressor.exchange(slots[index], gradient(index, rank, step)))
        totals.append({index: bits(engine.finish(ticket).values) for index, ticket in tickets.items()})
        for slot in slots:
            slot.memory.commit()
    engine.close()
    return totals


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["none", "terngrad", "adacomp_5", "topk_0.3"])
def test_ranks_that_hand_in_differently_agree(name, size, threaded):
    compressor = (SUMMED | FRAMED)[name]
    delays = random.Random(size)
    world = Rendezvous(size, lambda: delays.random() * 0.002)
    by_rank = on_all(
        size,
        lambda rank: exchanged(lambda r: OrderedEngine(world.transports[r], PLAN, threaded=threaded), compressor, rank),
    )
    for totals in by_rank:
        assert [sorted(step) for step in totals] == [sorted(arrivals(step, 0)) for step in range(6)]
        assert totals == by_rank[0]
    first = {i: run(compressor, [gradient(i, r, 0) for r in range(size)], name=f"p{i}", index=i) for i in range(8)}
    assert by_rank[0][0] == {i: bits(outcome.totals[0]) for i, outcome in first.items()}


def test_threads_change_nothing_in_what_is_posted():
    """Per interval the buckets of rank 0's order; new ones in the order of rank 0."""
    names = []
    for threaded in (True, False):
        world = Rendezvous(2)

        def train(rank: int, world: Rendezvous = world, threaded: bool = threaded) -> None:
            engine = OrderedEngine(world.transports[rank], PLAN, threaded=threaded)
            for _ in range(3):
                order = list(range(8)) if rank == 0 else [7, 6, 5, 4, 3, 2, 1, 0]
                for ticket in [engine.submit(index, gathers(index, rank)) for index in order]:
                    engine.finish(ticket)
            engine.close()

        on_all(2, train)
        names.append(world.names)
    assert names[0] == names[1]
    order = ["3", "2", "1", "0"]  # rank 0 hands in from the first parameter to the last
    expected = [f"hvd_compress.{number}.0.allgather" for number in order]
    assert names[0] == ["hvd_compress.object", *expected * 3]


def gathers_once(index: int, rank: int) -> Exchange:
    """As `gathers`, and says that nothing follows."""
    exchange = gathers(index, rank)
    frames = yield dataclasses.replace(next(exchange), last=True)
    with pytest.raises(StopIteration) as end:
        exchange.send(frames)
    return end.value.value


@pytest.mark.parametrize("threaded", [True, False])
def test_a_bucket_of_one_round_does_not_hold_up_the_next(threaded):
    """A rank posts it, and what follows it, before others have posted any; those of several rounds are waited for."""
    world = Rendezvous(2)
    engines = [OrderedEngine(transport, [[2], [1], [0]], threaded=threaded) for transport in world.transports]

    def hand_in(rank: int, exchanges: Sequence[Callable[[int, int], Exchange]]) -> list[Ticket]:
        tickets = [engines[rank].submit(index, exchanges[index](index, rank)) for index in (2, 1, 0)]
        if threaded:
            engines[rank].flush()
        return tickets

    def train(rank: int, exchanges: Sequence[Callable[[int, int], Exchange]]) -> list[float]:
        return [float(engines[rank].finish(ticket)) for ticket in hand_in(rank, exchanges)]

    once, several = [gathers_once] * 3, [gathers_once, gathers, gathers_once]
    assert on_all(2, lambda rank: train(rank, once)) == [[2.0, 1.0, 0.0]] * 2  # which gives the order
    before = world.transports[0].count
    for exchanges, posted in ((once, 3), (several, 2)):
        ahead = threading.Thread(target=train, args=(0, exchanges))
        ahead.start()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while world.transports[0].count < before + posted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)  # in which it could post more
        assert world.transports[0].count == before + posted
        assert train(1, exchanges) == [2.0, 1.0, 0.0]
        ahead.join()
        before = world.transports[0].count
    for engine in engines:
        engine.close()


def test_buckets_travel_while_others_are_still_to_come():
    world = Rendezvous(1)
    engine = OrderedEngine(world.transports[0], [[1], [0]])
    for ticket in [engine.submit(index, gathers(index)) for index in (1, 0)]:
        engine.finish(ticket)
    ticket = engine.submit(1, gathers(1))
    assert ticket.bucket.finished.wait(_PATIENCE_SECONDS)
    assert world.transports[0].threads.isdisjoint({threading.get_ident()})
    engine.close()


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_failure_reaches_whoever_finishes(threaded, fail_at):
    world = Rendezvous(1)
    world.transports[0].fail_at = fail_at
    engine = OrderedEngine(world.transports[0], [[2], [1], [0]], threaded=threaded)
    tickets = [engine.submit(index, gathers(index)) for index in range(3)]
    with pytest.raises(ConnectionError, match="network is down"):
        engine.finish(tickets[2])

    def again(rank: int) -> None:
        with pytest.raises(ConnectionError, match="network is down"):
            engine.finish(tickets[2])

    on_all(1, again, patience_seconds=3)  # in a thread, so that a hang is noticed
    engine.close()


def test_a_failing_exchange_reaches_whoever_finishes():
    def fails() -> Exchange:
        yield Allreduce(torch.zeros(1))
        raise wire.WireError(3, "w", "this", "that")

    engine = OrderedEngine(Rendezvous(1).transports[0], [[0]])
    ticket = engine.submit(0, fails())
    with pytest.raises(wire.WireError, match="rank 3"):
        engine.finish(ticket)
    engine.close()


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hvd_compress"]


def ended() -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive()


@pytest.mark.parametrize("after", ["nothing", "a step", "half a step"])
def test_to_close_ends_the_thread(after):
    assert ended()
    engine = OrderedEngine(Rendezvous(1).transports[0], PLAN)
    assert len(alive()) == 1
    tickets = [engine.submit(index, gathers(index)) for index in range(8) if after != "nothing"]
    if after == "a step":
        for ticket in tickets:
            engine.finish(ticket)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 4
    assert ended()
    engine.close()  # twice does no harm
    assert not engine.transport.aborted


def test_the_thread_ends_with_its_engine():
    engine = OrderedEngine(Rendezvous(1).transports[0], PLAN)
    engine.finish(engine.submit(0, gathers(0)))
    del engine
    gc.collect()
    assert ended()


def test_an_engine_may_be_collected_in_its_own_thread(monkeypatch):
    """The collector runs in whichever thread allocates."""
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    forgotten = threading.Event()

    class Collecting(Ordered):
        def allgather(self, name: str, parts: Sequence[torch.Tensor]) -> Pending:
            assert forgotten.wait(_PATIENCE_SECONDS)
            gc.collect()
            return super().allgather(name, parts)

    world = Rendezvous(1)
    engine = OrderedEngine(Collecting(world, 0), [[0]])
    engine.cycle = engine
    engine.submit(0, gathers(0))
    engine.flush()
    del engine
    forgotten.set()
    assert ended()
    assert [str(what.exc_value) for what in ignored] == []


def test_unthreaded_there_is_no_thread():
    OrderedEngine(Rendezvous(1).transports[0], PLAN, threaded=False).close()
    assert ended()


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_can_gather_the_state_of_all(size):
    shapes = {"a": (30, 40), "b": (20, 50)}
    world = Rendezvous(size)
    compressor = FRAMED["topk_0.3"]

    def train(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        compression = bound(compressor, shapes)
        compression.unregister()
        compression.attach(world.transports[rank], OrderedEngine)
        for step in range(2):
            mine = {name: gradient_like(*shape, seed=10 * step + rank) for name, shape in shapes.items()}
            tickets = [compression.submit(index, gradient) for index, gradient in enumerate(mine.values())]
            for ticket, gradient in zip(tickets, mine.values()):
                compression.finish(ticket, gradient, average=True)
        gathered = [compression.gather_state_dict(root) for root in range(size)]
        states = compression.state_dict(), gathered[rank]
        compression.detach()
        return states

    by_rank = on_all(size, train)
    for mine, everyones in by_rank:
        assert everyones["residuals"].keys() == set(range(size))
        assert {name: everyones[name] for name in ("step", "size", "loss_scale")} == {
            "step": 2,
            "size": size,
            "loss_scale": None,
        }
        assert len(mine["residuals"]) == 1
        for rank, (theirs, _) in enumerate(by_rank):
            found = everyones["residuals"][rank]
            assert {n: bits(r) for n, r in found.items()} == {n: bits(r) for n, r in theirs["residuals"][rank].items()}
    assert ended()


def test_to_close_in_a_collective_that_will_not_come_aborts(monkeypatch):
    monkeypatch.setattr("hvd_compress.ordered_engine._CLOSING_SECONDS", 0.2)
    world = Rendezvous(2)
    engine = OrderedEngine(world.transports[0], [[0]])
    engine.submit(0, gathers(0))
    engine.flush()
    engine.close()
    assert world.transports[0].aborted
    assert ended()


def test_an_engine_that_is_closed_does_not_hang():
    engine = OrderedEngine(Rendezvous(1).transports[0], [[0]])
    engine.close()

    def use(rank: int) -> None:
        with pytest.raises(RuntimeError):
            engine.finish(engine.submit(0, gathers(0)))

    on_all(1, use, patience_seconds=3)
