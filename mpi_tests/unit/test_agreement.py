"""What ranks compare in each step: equal terms cost one small sum, a difference is told by all ranks alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_compress import Compression, MismatchError
from hvd_compress.agreement import BYTES, agree, difference, mismatch
from hvd_compress.engine import _kind
from hvd_compress.local import LocalRanks
from hvd_compress.requests import Allgather, Allreduce, Broadcast, sent_bytes
from hvd_compress.step_check import GradientChangedError, Taken, called_by_grad_scaler, problem_of


def compare(terms: list[object], states: list[dict[str, str]], habits: list[object]) -> list[Any]:
    """What comes of it on each rank: the answer, or the error."""
    error = mismatch(7, "Do the same.")
    exchanges = [
        agree(rank, mine, lambda rank=rank: states[rank], error, habits=habits[rank]) for rank, mine in enumerate(terms)
    ]
    requests = [next(exchange) for exchange in exchanges]
    assert {sent_bytes(request) for request in requests} == {BYTES}
    answer: Any = torch.stack([request.tensor for request in requests]).amin(0)
    outcomes: list[Any] = []
    again = []
    for exchange in exchanges:
        try:
            again.append(exchange.send(answer))
        except StopIteration as end:
            outcomes.append(bool(end.value))
    frames = [request.frame for request in again if isinstance(request, Allgather)]
    for exchange in exchanges if frames else ():
        with pytest.raises(MismatchError) as caught:
            exchange.send(frames)
        outcomes.append(str(caught.value))
    return outcomes


def test_equal_terms_are_agreed_on():
    terms = {"a": 1.5, "b": ["x", "y"]}
    assert compare([terms] * 3, [{}] * 3, [None] * 3) == [True] * 3


def test_other_habits_are_told_and_no_error():
    assert compare([1] * 3, [{}] * 3, [[1], [1], [2]]) == [False] * 3


@pytest.mark.parametrize("odd", range(4))
def test_a_difference_is_the_same_error_on_every_rank(odd):
    terms = [("x", rank == odd) for rank in range(4)]
    states = [{"'w'": "trained", "'v'": "frozen" if rank == odd else "trained"} for rank in range(4)]
    usual = ", ".join(str(rank) for rank in range(4) if rank != odd)
    expected = f"the ranks disagree in step 7: 'v' is trained on rank {usual} and frozen on rank {odd}. Do the same."
    assert compare(terms, states, [None] * 4) == [expected] * 4


def test_what_only_some_ranks_know_of_is_a_difference():
    assert difference([{"a": "1"}, {"a": "1", "b": "2"}]) == ("b", {"unknown": [0], "2": [1]})


def test_terms_of_which_the_mean_or_the_sum_is_the_same_are_told_apart():
    assert compare([[1, 3], [2, 2], [3, 1]], [{"n": str(rank)} for rank in range(3)], [None] * 3)[0].startswith("the")


@pytest.mark.parametrize("request_", [Allreduce, lambda tensor: Broadcast(tensor, 0)])
def test_names_of_collectives_are_the_same_on_every_gpu_of_a_node(request_):
    kinds = {
        _kind(request_(SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", index)))) for index in range(4)
    }
    assert len(kinds) == 1
    assert kinds.pop().endswith("torch.float32.cuda")


@pytest.mark.parametrize("size", [2, 3])
def test_a_schedule_that_differs_is_found_before_anything_is_exchanged(size):
    named = [("w", torch.zeros(40, 50))]
    ranks = LocalRanks(
        [
            Compression.topk(named, density=lambda step, odd=rank == 1: 0.2 if odd and step == 5 else 0.1)
            for rank in range(size)
        ]
    )
    for _ in range(5):
        ranks.exchange([{"w": torch.randn(40, 50)} for _ in range(size)])
    with pytest.raises(
        MismatchError, match=r"in step 5: density is 0\.1 on rank 0.* and 0\.2 on rank 1|0\.2 on rank 1"
    ):
        ranks.exchange([{"w": torch.randn(40, 50)} for _ in range(size)])


def test_a_change_in_place_is_seen_and_what_we_write_ourselves_is_not():
    taken, gradients = Taken(), [torch.ones(3) for _ in range(3)]
    for index, gradient in enumerate(gradients):
        taken.add(index, gradient)
    gradients[0].data.fill_(5.0)
    gradients[1].mul_(2.0)
    assert taken.changed() == [1]


def test_gradients_that_come_outside_a_backward_pass_are_late():
    taken, parameter = Taken(), torch.nn.Parameter(torch.ones(3))
    parameter.register_post_accumulate_grad_hook(lambda p: taken.add(0, p.grad))
    (parameter * 2).sum().backward()
    taken.add(1, torch.ones(2))
    assert taken.late == [1]


def test_the_error_names_the_first_of_many_gradients():
    said = str(GradientChangedError.of([f"w{number}" for number in range(9)]))
    assert "'w0', 'w1', 'w2' and 6 more parameters" in said


def test_a_grad_scaler_among_the_calls_is_found():
    class Stepped(torch.optim.SGD):
        found = False

        def step(self, closure=None):
            Stepped.found = called_by_grad_scaler()

    parameter = torch.nn.Parameter(torch.ones(3))
    scaler, optimizer = torch.amp.GradScaler("cpu"), Stepped([parameter], lr=0.1)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert Stepped.found
    assert not called_by_grad_scaler()


def test_an_optimizer_whose_parameters_are_all_known_has_no_problem():
    model = torch.nn.Linear(3, 4)
    compression = Compression.topk(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert problem_of(optimizer, compression.compressor, compression.binding) is None
    assert problem_of(None, compression.compressor, compression.binding) is None
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})
    assert "(2, 2)" in problem_of(optimizer, compression.compressor, compression.binding)
