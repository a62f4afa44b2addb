"""Simulated ranks, and the fusing of requests that all transports share."""

from __future__ import annotations

import pytest
import torch

from hvd_compress import wire
from hvd_compress.requests import Allgather, Allreduce, Alltoall, Broadcast, ReduceOp
from hvd_compress.transports.local import LocalWorld

from .drive import SIZES

sizes = pytest.mark.parametrize("size", SIZES)


def frame(rank: int, number: int) -> torch.Tensor:
    payload = torch.full((rank + number,), 16 * rank + number, dtype=torch.uint8)
    return wire.pack(wire.Frame(1, torch.float32, rank, number, 0.0, 1, payload))


@sizes
@pytest.mark.parametrize(("op", "combine"), [("SUM", sum), ("MAX", max), ("MIN", min)])
def test_tensors_are_reduced_and_keep_their_shapes(size, op, combine):
    world = LocalWorld(size)
    shapes = [(2, 3), (), (0,), (4,)]

    def requests(rank: int) -> list[Allreduce]:
        return [Allreduce(torch.full(shape, float(rank - 1)), ReduceOp[op]) for shape in shapes]

    pendings = [transport.post("x", requests(transport.rank)) for transport in world.transports]
    for pending in pendings:
        answers = pending.wait()
        assert [answer.shape for answer in answers] == [torch.Size(shape) for shape in shapes]
        for answer in answers:
            assert bool((answer == combine(float(rank - 1) for rank in range(size))).all())


@sizes
def test_requests_keep_their_tensors(size):
    world = LocalWorld(size)
    tensors = [torch.full((3,), float(rank)) for rank in range(size)]
    pendings = [t.post("x", [Allreduce(tensors[t.rank])]) for t in world.transports]
    for pending in pendings:
        pending.wait()[0].zero_()
    assert [tensor.tolist() for tensor in tensors] == [[float(rank)] * 3 for rank in range(size)]


@sizes
def test_frames_arrive_in_rank_order_whatever_their_lengths(size):
    world = LocalWorld(size)
    pendings = [
        t.post("x", [Allgather(frame(t.rank, number)) for number in range(3)]) for t in reversed(world.transports)
    ]
    for pending in pendings:
        answers = pending.wait()
        assert len(answers) == 3
        for number, frames in enumerate(answers):
            assert len(frames) == size
            for rank, found in enumerate(frames):
                assert torch.equal(found, frame(rank, number))


@sizes
def test_frames_reach_whom_they_are_addressed_to(size):
    world = LocalWorld(size)
    pendings = [
        t.post("x", [Alltoall([frame(t.rank, 10 * number + to) for to in range(size)]) for number in range(2)])
        for t in world.transports
    ]
    for rank, pending in enumerate(pendings):
        for number, frames in enumerate(pending.wait()):
            for source, found in enumerate(frames):
                assert torch.equal(found, frame(source, 10 * number + rank))


@sizes
def test_a_broadcast_gives_all_what_the_root_has(size):
    world = LocalWorld(size)
    root = size - 1
    pendings = [
        t.post(
            "x", [Broadcast(torch.full((2, 2), float(t.rank)), root), Broadcast(torch.tensor([float(t.rank)]), root)]
        )
        for t in world.transports
    ]
    for pending in pendings:
        matrix, vector = pending.wait()
        assert matrix.tolist() == [[float(root)] * 2] * 2
        assert vector.tolist() == [float(root)]


@sizes
def test_objects_are_gathered_in_rank_order(size):
    world = LocalWorld(size)
    pendings = [t.gather_objects("x", {"rank": t.rank, "text": "ö" * t.rank}) for t in world.transports]
    for pending in pendings:
        assert pending.wait() == [{"rank": rank, "text": "ö" * rank} for rank in range(size)]


def test_names_can_be_used_again_once_all_have_the_answer():
    world = LocalWorld(2)
    for _ in range(3):
        pendings = [t.allreduce("x", torch.ones(1), ReduceOp.SUM) for t in world.transports]
        assert [pending.wait().item() for pending in pendings] == [2.0, 2.0]


def test_a_collective_is_ready_once_all_have_posted_it():
    world = LocalWorld(2)
    first = world.transports[0].allreduce("x", torch.ones(1), ReduceOp.SUM)
    assert not first.ready()
    second = world.transports[1].allreduce("x", torch.ones(1), ReduceOp.SUM)
    assert first.ready()
    first.wait()
    assert second.ready()


def test_to_post_a_name_twice_is_an_error():
    (transport, _) = LocalWorld(2).transports
    transport.allreduce("x", torch.ones(1), ReduceOp.SUM)
    with pytest.raises(RuntimeError, match="rank 0 posted 'x' twice"):
        transport.allreduce("x", torch.ones(1), ReduceOp.SUM)


@pytest.mark.parametrize("size", [0, -1])
def test_a_world_has_ranks(size):
    with pytest.raises(ValueError, match=f"size must be at least 1: {size}"):
        LocalWorld(size)


def test_another_number_of_frames_is_an_error_with_the_peer():
    world = LocalWorld(2)
    first = world.transports[0].post("x", [Allgather(frame(0, 0)), Allgather(frame(0, 1))])
    world.transports[1].post("x", [Allgather(frame(1, 0))])
    with pytest.raises(wire.WireError, match="rank 1"):
        first.wait()
