"""The engine: what travels together, when, and under which name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hvd_compress import wire
from hvd_compress.engine import Engine, cut
from hvd_compress.requests import Allgather, Allreduce, Broadcast, Exchange, ReduceOp, Request
from hvd_compress.transports.base import Pending, Transport
from hvd_compress.transports.local import LocalWorld

from .drive import bits


class Answered(Pending):
    def __init__(self, transport: Recording, answer: Any) -> None:
        self._transport, self._answer, self.taken = transport, answer, 0

    def ready(self) -> bool:
        return self._transport.ready

    def wait(self) -> Any:
        self.taken += 1
        return self._answer


class Recording(Transport):
    """A world of one rank that writes down what is asked of it."""

    rank, size = 0, 1

    def __init__(self, ready: bool = True) -> None:
        self.ready = ready
        self.posts: list[tuple[str, list[Request]]] = []
        self.pendings: list[Answered] = []

    def post(self, name: str, requests: Sequence[Request]) -> Pending:
        self.posts.append((name, list(requests)))
        return super().post(name, requests)

    def _answer(self, answer: Any) -> Pending:
        self.pendings.append(Answered(self, answer))
        return self.pendings[-1]

    def allreduce(self, name: str, tensor: torch.Tensor, op: ReduceOp) -> Pending:
        return self._answer(tensor)

    def broadcast(self, name: str, tensor: torch.Tensor, root: int) -> Pending:
        return self._answer(tensor)

    def allgather(self, name: str, parts: Sequence[torch.Tensor]) -> Pending:
        return self._answer([torch.cat(list(parts))])

    def alltoall(self, name: str, parts: Sequence[Sequence[torch.Tensor]]) -> Pending:
        return self._answer([torch.cat(list(parts[0]))])

    @property
    def content(self) -> list[tuple[str, list[Any]]]:
        """Names, and the parameters of the frames or the values of the tensors."""
        return [(name, [told(request) for request in requests]) for name, requests in self.posts]


def told(request: Request) -> Any:
    return wire.unpack(request.frame, 0).parameter if isinstance(request, Allgather) else request.tensor.tolist()


def frame(index: int) -> Allgather:
    return Allgather(wire.pack(wire.Frame(1, torch.float32, 0, index, 0.0, 1, torch.zeros(4, dtype=torch.uint8))))


def gathers(index: int, rounds: int = 1) -> Exchange:
    for _ in range(rounds):
        frames = yield frame(index)
        assert wire.unpack(frames[0], 0).parameter == index
    return torch.tensor([float(index)])


def reduces(index: int, op: ReduceOp = ReduceOp.SUM, dtype: torch.dtype = torch.float32) -> Exchange:
    answer = yield Allreduce(torch.tensor([index], dtype=dtype), op)
    return answer.float()


def scaled(index: int) -> Exchange:
    yield Allreduce(torch.tensor([float(index)]), ReduceOp.MAX)
    return (yield from gathers(index))


PLAN = [[3, 2], [1, 0]]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
@pytest.mark.parametrize("exchange", [gathers, reduces, scaled])
def test_what_travels_together_does_not_depend_on_the_order_of_arrival(order, exchange):
    transport = Recording(ready=False)
    engine = Engine(transport, PLAN)
    tickets = {index: engine.submit(index, exchange(index)) for index in order}
    results = {index: engine.finish(ticket).item() for index, ticket in tickets.items()}
    assert results == {index: float(index) for index in range(4)}
    expected = Recording(ready=False)
    again = Engine(expected, PLAN)
    for ticket in [again.submit(index, exchange(index)) for index in range(4)]:
        again.finish(ticket)
    assert sorted(transport.content) == sorted(expected.content)


def test_a_full_bucket_leaves_at_once_and_alone():
    transport = Recording(ready=False)
    engine = Engine(transport, PLAN, "job")
    engine.submit(3, gathers(3))
    assert transport.posts == []
    engine.submit(2, gathers(2))
    assert transport.content == [("job.0.0.allgather", [2, 3])]


def test_an_incomplete_bucket_leaves_at_the_flush():
    transport = Recording()
    engine = Engine(transport, PLAN)
    ticket = engine.submit(3, gathers(3))
    engine.submit(0, gathers(0))
    engine.flush()
    assert transport.content == [("hvd_compress.0.0.allgather", [3]), ("hvd_compress.1.0.allgather", [0])]
    assert engine.finish(ticket).item() == 3.0


def test_to_finish_is_to_flush():
    transport = Recording()
    engine = Engine(transport, PLAN)
    assert engine.finish(engine.submit(1, gathers(1))).item() == 1.0


def step(engine: Engine, indices: Sequence[int]) -> None:
    for ticket in [engine.submit(index, gathers(index)) for index in indices]:
        engine.finish(ticket)


def test_a_bucket_no_longer_waits_for_who_stayed_away():
    transport = Recording(ready=False)
    engine = Engine(transport, PLAN)
    step(engine, [3, 1, 0])
    transport.posts.clear()
    engine.submit(3, gathers(3))
    assert transport.content == [("hvd_compress.0.0.allgather", [3])]


def test_who_comes_later_travels_alone_once_then_with_the_others():
    transport = Recording()
    engine = Engine(transport, PLAN)
    step(engine, [3, 1, 0])
    transport.posts.clear()
    step(engine, [2, 3])
    assert transport.content == [("hvd_compress.0.0.allgather", [3]), ("hvd_compress.0.late.0.allgather", [2])]
    transport.posts.clear()
    step(engine, [2, 3])
    assert transport.content == [("hvd_compress.0.0.allgather", [2, 3])]


def test_a_bucket_of_which_nobody_came_is_expected_whole():
    transport = Recording()
    engine = Engine(transport, PLAN)
    step(engine, [1, 0])
    transport.posts.clear()
    engine.submit(3, gathers(3))
    assert transport.posts == []


def test_later_rounds_start_while_others_are_still_to_come():
    transport = Recording(ready=False)
    engine = Engine(transport, [[3], [2], [1], [0]])
    engine.submit(3, scaled(3))
    engine.submit(2, scaled(2))
    assert len(transport.posts) == 2
    transport.ready = True
    engine.submit(1, scaled(1))
    assert [name for name, _ in transport.posts] == [
        "hvd_compress.0.0.allreduce.max.torch.float32.cpu",
        "hvd_compress.1.0.allreduce.max.torch.float32.cpu",
        "hvd_compress.2.0.allreduce.max.torch.float32.cpu",
        "hvd_compress.0.1.allgather",
        "hvd_compress.1.1.allgather",
        "hvd_compress.2.1.allgather",
    ]


def test_the_rounds_of_a_bucket_are_fused_each():
    transport = Recording()
    engine = Engine(transport, [[3, 2, 1, 0]])
    step_tickets = [engine.submit(index, scaled(index)) for index in (2, 0, 3, 1)]
    for ticket in step_tickets:
        engine.finish(ticket)
    assert transport.content == [
        ("hvd_compress.0.0.allreduce.max.torch.float32.cpu", [[0.0], [1.0], [2.0], [3.0]]),
        ("hvd_compress.0.1.allgather", [0, 1, 2, 3]),
    ]


def test_requests_travel_with_their_kind():
    def broadcasts(index: int) -> Exchange:
        return (yield Broadcast(torch.tensor([float(index)]), index % 2))

    transport = Recording()
    engine = Engine(transport, [list(range(12))])
    exchanges = [
        gathers(0),
        reduces(1),
        reduces(2, ReduceOp.MAX),
        reduces(3, ReduceOp.MIN),
        reduces(4, dtype=torch.float16),
        broadcasts(5),
        broadcasts(6),
        gathers(7, 2),
        scaled(8),
        reduces(9),
        broadcasts(10),
        reduces(11, dtype=torch.float64),
    ]
    tickets = [engine.submit(index, exchange) for index, exchange in enumerate(exchanges)]
    assert [engine.finish(ticket).item() for ticket in tickets] == list(range(12))
    prefix = "hvd_compress.0.0."
    assert transport.content == [
        (prefix + "allgather", [0, 7]),
        (prefix + "allreduce.max.torch.float32.cpu", [[2.0], [8.0]]),
        (prefix + "allreduce.min.torch.float32.cpu", [[3.0]]),
        (prefix + "allreduce.sum.torch.float16.cpu", [[4.0]]),
        (prefix + "allreduce.sum.torch.float32.cpu", [[1.0], [9.0]]),
        (prefix + "allreduce.sum.torch.float64.cpu", [[11.0]]),
        (prefix + "broadcast.0.torch.float32.cpu", [[6.0], [10.0]]),
        (prefix + "broadcast.1.torch.float32.cpu", [[5.0]]),
        ("hvd_compress.0.1.allgather", [7, 8]),
    ]


def test_names_differ_within_a_step():
    transport = Recording(ready=False)
    engine = Engine(transport, [[3], [2, 1], [0]])
    tickets = [engine.submit(index, scaled(index)) for index in range(4)]
    for ticket in tickets:
        engine.finish(ticket)
    names = [name for name, _ in transport.posts]
    assert len(set(names)) == len(names)


def test_every_answer_is_taken_once():
    transport = Recording()
    engine = Engine(transport, PLAN)
    tickets = [engine.submit(index, scaled(index)) for index in range(4)]
    for _ in range(2):
        for ticket in tickets:
            engine.finish(ticket)
    assert [pending.taken for pending in transport.pendings] == [1] * len(transport.pendings)


def test_a_gradient_cannot_be_handed_in_twice():
    engine = Engine(Recording(), PLAN)
    engine.submit(3, gathers(3))
    with pytest.raises(RuntimeError, match="parameter 3 was handed in twice"):
        engine.submit(3, gathers(3))
    engine.submit(2, gathers(2))  # the bucket has left
    with pytest.raises(RuntimeError, match="parameter 2 was handed in twice"):
        engine.submit(2, gathers(2))


def test_a_gradient_can_be_handed_in_again_after_its_step():
    engine = Engine(Recording(), PLAN)
    for _ in range(3):
        step(engine, [0, 1, 2, 3])


def test_exchanges_without_requests_are_done_at_once():
    def silent() -> Exchange:
        return torch.tensor([5.0])
        yield

    transport = Recording()
    engine = Engine(transport, PLAN)
    assert engine.finish(engine.submit(0, silent())).item() == 5.0
    assert transport.posts == []


def test_bytes_of_all_rounds_are_counted():
    engine = Engine(Recording(), PLAN)
    ticket = engine.submit(0, scaled(0))
    engine.finish(ticket)
    assert ticket.sent_bytes == 4 + 40


def test_an_exchange_that_fails_does_not_block_the_next_try():
    def fails() -> Exchange:
        raise ValueError("no")
        yield

    engine = Engine(Recording(), PLAN)
    with pytest.raises(ValueError, match="no"):
        engine.submit(0, fails())
    assert engine.finish(engine.submit(0, gathers(0))).item() == 0.0


@pytest.mark.parametrize(
    ("sizes", "bucket_bytes", "plan"),
    [
        ({}, 10, []),
        ({0: 4, 1: 4, 2: 4}, 8, [[2, 1], [0]]),
        ({0: 4, 1: 4, 2: 4}, 1, [[2], [1], [0]]),
        ({0: 4, 1: 400, 2: 4}, 8, [[2], [1], [0]]),
        ({5: 4, 1: 4, 3: 0}, 1000, [[5, 3, 1]]),
        ({0: 0, 1: 0}, 1, [[1, 0]]),
    ],
)
def test_parameters_are_cut_from_the_last_to_the_first(sizes, bucket_bytes, plan):
    assert cut(sizes, bucket_bytes) == plan


def test_simulated_ranks_advance_one_another():
    world = LocalWorld(3)
    engines = [Engine(transport, [[1, 0], [2]]) for transport in world.transports]
    world.polls.update({rank: engine.poll for rank, engine in enumerate(engines)})
    tickets = []
    for rank, engine in enumerate(engines):
        tickets.append(
            {
                index: engine.submit(index, ranked(index, rank, rounds=4))
                for index in ((0, 1, 2), (2, 1, 0), (1, 2, 0))[rank]
            }
        )
    for engine in engines:
        engine.flush()
    totals = [{i: bits(engine.finish(t)) for i, t in mine.items()} for engine, mine in zip(engines, tickets)]
    assert totals[0] == totals[1] == totals[2]


def ranked(index: int, rank: int, rounds: int) -> Exchange:
    total = torch.zeros(1)
    for number in range(rounds):
        total = total + (yield Allreduce(torch.tensor([float(100 * index + 10 * rank + number)])))
        frames = yield Allgather(
            wire.pack(wire.Frame(1, torch.float32, rank, index, 0.0, 1, torch.zeros(4 * rank, dtype=torch.uint8)))
        )
        assert [wire.unpack(buffer, peer).payload.numel() for peer, buffer in enumerate(frames)] == [0, 4, 8]
    return total


def test_a_rank_that_stays_away_is_named_not_waited_for():
    world = LocalWorld(3)
    engines = [Engine(transport, [[0]]) for transport in world.transports]
    tickets = [engine.submit(0, gathers(0)) for engine in engines[::2]]
    with pytest.raises(RuntimeError, match=r"ranks \[1\] never posted"):
        engines[0].finish(tickets[0])


def test_a_rank_with_other_tensors_is_an_error_not_a_broadcast():
    world = LocalWorld(2)
    pendings = [
        transport.allreduce("sum", torch.ones(number + 1), ReduceOp.SUM)
        for number, transport in enumerate(world.transports)
    ]
    with pytest.raises((RuntimeError, ValueError)):
        pendings[0].wait()


def test_a_damaged_frame_stays_the_error_of_all_who_ask():
    """Handles can be waited for once; a second try must not hide the first error behind another."""

    class Once(Pending):
        taken = False

        def ready(self) -> bool:
            return False

        def wait(self) -> Any:
            if self.taken:
                raise KeyError("no such handle")
            self.taken = True
            return [torch.zeros(10, dtype=torch.uint8)]

    class Damaging(Recording):
        def allgather(self, name: str, parts: Sequence[torch.Tensor]) -> Pending:
            return Once()

    engine = Engine(Damaging(), [[0, 1]])
    tickets = [engine.submit(index, gathers(index)) for index in range(2)]
    for ticket in tickets:
        with pytest.raises(wire.WireError):
            engine.finish(ticket)
