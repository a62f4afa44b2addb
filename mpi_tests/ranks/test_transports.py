"""The primitives of each backend's transport, by themselves."""

import pytest
import torch

from hvd_compress.requests import ReduceOp
from hvd_compress.transports.base import Transport

from .job import Job


@pytest.fixture(scope="module")
def transport(job: Job) -> Transport:
    return job.transport()


def values(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, which every type adds exactly."""
    return torch.randint(-50, 50, (1000,), generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32])
@pytest.mark.parametrize("op", ReduceOp)
def test_allreduce(job: Job, transport: Transport, op: ReduceOp, dtype: torch.dtype) -> None:
    everyone = torch.stack([values(rank, dtype) for rank in range(job.size)])
    expected = {ReduceOp.SUM: everyone.sum(0), ReduceOp.MAX: everyone.amax(0), ReduceOp.MIN: everyone.amin(0)}[op]
    reduced = transport.allreduce(f"test.allreduce.{op.value}.{dtype}", values(job.rank, dtype), op).wait()
    torch.testing.assert_close(reduced, expected.to(dtype), rtol=0, atol=0)


def test_the_maximum_of_infinity_and_numbers_is_infinity(job: Job, transport: Transport) -> None:
    mine = torch.tensor([float("inf") if job.rank == 0 else 1.0])
    assert float(transport.allreduce("test.infinity", mine, ReduceOp.MAX).wait()) == float("inf")


def message(sender: int, receiver: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * sender + receiver)
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("unit", [1, 8, 1000, 100_000])
def test_allgather_of_lengths_that_differ(job: Job, transport: Transport, unit: int) -> None:
    """Rank 0 sends nothing."""
    mine = message(job.rank, 0, job.rank * unit)
    parts = [mine[: job.rank], mine[job.rank :]]
    gathered = transport.allgather(f"test.allgather.{unit}", parts).wait()
    assert [buffer.tolist() for buffer in gathered] == [
        message(rank, 0, rank * unit).tolist() for rank in range(job.size)
    ]


def test_a_name_comes_again_with_messages_of_other_lengths(job: Job, transport: Transport) -> None:
    """As those of AdaComp do, step by step: the room that they had may be too small, or too large."""
    for step, longest in enumerate([100, 100, 107, 5000, 5000, 3, 0, 0, 400_000, 16, 17]):
        lengths = [longest if rank == step % job.size else longest * 7 // 8 for rank in range(job.size)]
        gathered = transport.regather("test.again", [message(job.rank, step, lengths[job.rank])]).wait()
        for rank, buffer in enumerate(gathered):
            assert torch.equal(buffer, message(rank, step, lengths[rank]))


def test_allgather_of_nothing(job: Job, transport: Transport) -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    assert [buffer.numel() for buffer in transport.allgather("test.nothing", [empty]).wait()] == [0] * job.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_broadcast_from_every_root(job: Job, transport: Transport, dtype: torch.dtype) -> None:
    for root in range(job.size):
        expected = values(root, torch.int64).abs().to(dtype)
        received = transport.broadcast(
            f"test.broadcast.{dtype}.{root}", values(job.rank, torch.int64).abs().to(dtype), root
        ).wait()
        torch.testing.assert_close(received, expected, rtol=0, atol=0)


def length(sender: int, receiver: int) -> int:
    """Also zero, and other lengths the other way round."""
    return (sender * 7 + receiver * 3) % 5 * 1001


def test_alltoall_of_lengths_that_differ(job: Job, transport: Transport) -> None:
    parts = []
    for to in range(job.size):
        whole = message(job.rank, to, length(job.rank, to))
        parts.append([whole[:10], whole[10:]])
    received = transport.alltoall("test.alltoall", parts).wait()
    for sender, buffer in enumerate(received):
        assert torch.equal(buffer, message(sender, job.rank, length(sender, job.rank)))


def test_collectives_may_be_under_way_together(job: Job, transport: Transport) -> None:
    pending = [
        transport.allreduce("test.many.1", torch.ones(10), ReduceOp.SUM),
        transport.allgather("test.many.2", [message(job.rank, 0, 100)]),
        transport.broadcast("test.many.3", torch.full((5,), float(job.rank)), job.size - 1),
        transport.allreduce("test.many.4", torch.full((10,), job.rank), ReduceOp.MAX),
    ]
    answers = [one.wait() for one in reversed(pending)]
    assert answers[0].tolist() == [job.size - 1] * 10
    assert answers[1].tolist() == [job.size - 1] * 5
    assert torch.equal(answers[2][-1], message(job.size - 1, 0, 100))
    assert answers[3].tolist() == [float(job.size)] * 10


@pytest.mark.parametrize("kind", ["allreduce", "broadcast", "allgather", "regather", "alltoall"])
def test_to_post_waits_for_no_other_rank(several: Job, transport: Transport, kind: str) -> None:
    name, mine = f"test.post.{kind}", message(several.rank, 0, 500 * several.rank)
    post = {
        "allreduce": lambda: transport.allreduce(name, torch.ones(10), ReduceOp.SUM),
        "broadcast": lambda: transport.broadcast(name, torch.ones(10), 0),
        "allgather": lambda: transport.allgather(name, [mine]),
        "regather": lambda: transport.regather(name, [mine]),
        "alltoall": lambda: transport.alltoall(name, [[mine]] * several.size),
    }[kind]
    for first in range(several.size):
        pending = post() if several.rank == first else None
        several.barrier()
        (pending or post()).wait()


def test_an_answer_may_be_taken_before_or_after_the_next_post(several: Job, transport: Transport) -> None:
    """Also one that does not fit in its room, of which more follows."""
    for step, length in enumerate([10, 5000, 70_000]):
        posted = [transport.regather("test.taken", [message(several.rank, step, length)])]
        answers = [posted[0].wait()] if several.rank == 0 and step > 0 else []
        posted.append(
            transport.alltoall("test.next", [[message(several.rank, to, length)] for to in range(several.size)])
        )
        answers += [pending.wait() for pending in posted[len(answers) :]]
        for rank in range(several.size):
            assert torch.equal(answers[0][rank], message(rank, step, length))
            assert torch.equal(answers[1][rank], message(rank, several.rank, length))


def test_objects_arrive_in_rank_order(job: Job, transport: Transport) -> None:
    said = transport.gather_objects("test.objects", {"rank": job.rank, "text": "é" * job.rank}).wait()
    assert said == [{"rank": rank, "text": "é" * rank} for rank in range(job.size)]
    assert transport.broadcast_object(f"from {job.rank}", root=job.size - 1) == f"from {job.size - 1}"


def test_a_gather_beyond_what_horovod_can_count_is_an_error_with_the_remedy(
    horovod: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvd_compress.transports import horovod as module

    transport = horovod.transport()
    parts = [torch.full((1000,), horovod.rank, dtype=torch.uint8)]
    monkeypatch.setattr(module, "MAX_ELEMENTS", 126 * horovod.size)  # 8 bytes of length, 1000, and no padding
    gathered = transport.allgather("nearly too much", parts).wait()
    assert [(buffer.numel(), int(buffer[0])) for buffer in gathered] == [(1000, rank) for rank in range(horovod.size)]
    monkeypatch.setattr(module, "MAX_ELEMENTS", 126 * horovod.size - 1)
    with pytest.raises(ValueError, match="more than Horovod can gather at once.*bucket_bytes="):
        transport.allgather("too much", parts)
    assert module.outstanding() == []
