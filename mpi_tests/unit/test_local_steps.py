"""Local steps: the outer rules by their formulas, what is refused, and what one rank alone does."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from hvd_compress import Compression
from hvd_compress.connection import connect
from hvd_compress.elastic import LocalStepsKeeper
from hvd_compress.local_steps import Averaging, LocalSteps, Nesterov, SparseLoCo
from hvd_compress.training.rounds import cut
from hvd_compress.transports.local import LocalWorld


def test_nesterov_by_its_formula():
    rule, moments = Nesterov(lr=0.7, momentum=0.9), {}
    # b = 1, then 0.9 - 0.5 = 0.4, then 0.36 + 0.25 = 0.61; move = 0.7 (mean + 0.9 b)
    means, moves = (1.0, -0.5, 0.25), (1.33, -0.098, 0.5593)
    for mean, move in zip(means, moves):
        found = rule.move(torch.tensor([mean], dtype=torch.float64), moments)
        torch.testing.assert_close(found, torch.tensor([move], dtype=torch.float64), rtol=1e-15, atol=0)


def test_nesterov_is_torchs_sgd_with_the_mean_as_negative_gradient():
    rule, moments = Nesterov(lr=0.3, momentum=0.8), {}
    theirs = nn.Parameter(torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ours = theirs.detach().clone()
    sgd = torch.optim.SGD([theirs], lr=0.3, momentum=0.8, nesterov=True)
    for step in range(5):
        mean = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1 + step))
        theirs.grad = -mean
        sgd.step()
        ours += rule.move(mean, moments)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-14, atol=1e-14)


def test_averaging_and_sparseloco_add_the_mean():
    mean = torch.tensor([0.5, -2.0])
    assert torch.equal(Averaging().move(mean, {}), mean)
    assert torch.equal(SparseLoCo(lr=0.5).move(mean, {}), mean / 2)
    assert (Averaging().decay, Nesterov().decay, SparseLoCo().decay) == (1.0, 1.0, 0.95)


@pytest.mark.parametrize(
    "make",
    [lambda: Averaging(lr=0), lambda: Nesterov(momentum=1), lambda: Nesterov(lr=-1), lambda: SparseLoCo(beta=1.1)],
)
def test_options_of_rules_that_cannot_work_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize(
    ("numels", "count", "parts"),
    [
        ([5, 5, 5, 5], 1, [[0, 1, 2, 3]]),
        ([5, 5, 5, 5], 2, [[0, 1], [2, 3]]),
        ([5, 5, 5, 5], 4, [[0], [1], [2], [3]]),
        ([100, 1, 1], 3, [[0], [1], [2]]),
        ([1, 1, 100], 2, [[0, 1], [2]]),
        ([10, 20, 30, 40], 2, [[0, 1, 2], [3]]),
        ([0, 0], 2, [[0], [1]]),
    ],
)
def test_fragments_are_about_equal_and_none_is_empty(numels, count, parts):
    assert cut(numels, count) == parts


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(of: nn.Module, optimizer: torch.optim.Optimizer, steps: range, local: LocalSteps | None = None) -> None:
    for step in steps:
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        of(inputs).pow(2).mean().backward()
        optimizer.step()
        if local:
            local.step()


def test_one_rank_that_averages_trains_as_without():
    ours, theirs = model(), model()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    compression = Compression.topk(ours.named_parameters(), density=0.01)
    with LocalSteps(optimizer, compression, every=3, outer=Averaging(), over=LocalWorld(1).transports[0]) as local:
        train(ours, optimizer, range(7), local)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), range(7))
    assert (local.steps, local.rounds) == (7, 2)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_one_rank_makes_outer_steps_of_nesterov():
    ours, theirs = model(), model()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    compression = Compression.none(ours.named_parameters())
    local = LocalSteps(optimizer, compression, every=2, outer=Nesterov(0.5, 0.5), over=LocalWorld(1).transports[0])
    train(ours, optimizer, range(4), local)
    shared, momentum = [p.detach().clone() for p in theirs.parameters()], [0.0] * 4
    for start in (0, 2):
        train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), range(start, start + 2))
        for index, parameter in enumerate(theirs.parameters()):
            moved = parameter.detach() - shared[index]
            momentum[index] = 0.5 * momentum[index] + moved
            shared[index] = shared[index] + 0.5 * (moved + 0.5 * momentum[index])
            parameter.data.copy_(shared[index])
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def of_one_rank(optimizer=None, compression=None, **options) -> LocalSteps:
    of = model()
    optimizer = optimizer or torch.optim.SGD(of.parameters(), lr=0.1)
    compression = compression or Compression.none(
        [(f"p{i}", p) for i, p in enumerate(optimizer.param_groups[0]["params"])]
    )
    return LocalSteps(optimizer, compression, over=LocalWorld(1).transports[0], **options)


def named() -> tuple[torch.optim.Optimizer, list[tuple[str, Tensor]]]:
    of = model()
    return torch.optim.SGD(of.parameters(), lr=0.1), list(of.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"every": 4, "fragments": 5}, "fragments must be"),
        ({"every": 30, "fragments": 5}, "at most every=30 and the 4 parameters"),
        ({"fragments": 0}, "fragments must be"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        of_one_rank(**options)


@pytest.mark.parametrize(
    ("make", "outer", "message"),
    [
        (lambda n: Compression.dgc(n, density=0.1), None, "momentum of gradients"),
        (lambda n: Compression.onebit(n, momentum=0.9, warmup_steps=3), None, "momentum of gradients"),
        (lambda n: Compression.qsgd(n), SparseLoCo(), "error feedback"),
        (lambda n: Compression.topk(n[1:], density=0.1), None, "does not know all parameters"),
    ],
)
def test_compressions_that_cannot_work_are_refused_with_a_remedy(make, outer, message):
    optimizer, pairs = named()
    with pytest.raises(ValueError, match=message):
        of_one_rank(optimizer, make(pairs), outer=outer)


def test_sparseloco_without_compression_needs_no_error_feedback():
    optimizer, pairs = named()
    of_one_rank(optimizer, Compression.none(pairs), outer=SparseLoCo())


def test_a_forgotten_step_is_an_error():
    optimizer, pairs = named()
    of_one_rank(optimizer, Compression.none(pairs), every=3)
    for _ in range(6):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"7 steps without a call of LocalSteps.step\(\)"):
        optimizer.step()


def test_nothing_that_connects_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)  # other tests may have imported it
    with pytest.raises(ValueError, match=r"nothing connects the ranks. Remedy: call hvd.init\(\)"):
        connect()
    with pytest.raises(ValueError, match="a communicator, a process group"):
        connect("everyone")


def test_parameters_that_are_not_finite_are_an_error_and_stay_as_they_are():
    of = model()
    optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
    local = of_one_rank(optimizer, Compression.none(of.named_parameters()), every=1)
    of[2].weight.data[1, 2] = float("inf")
    before = [p.detach().clone() for p in of.parameters()]
    with pytest.raises(FloatingPointError, match=r"parameters of rank 0 are not finite.*step 1.*Remedy"):
        local.step()
    assert all(torch.equal(a, b) for a, b in zip(before, of.parameters()))


def test_a_state_of_another_model_is_refused():
    local = of_one_rank()
    state = local.state_dict()
    with pytest.raises(ValueError, match="other parameters"):
        local.load_state_dict(state | {"shared": {"p0": torch.zeros(3)}})
    with pytest.raises(ValueError, match="fragments=2"):
        local.load_state_dict(state | {"since": [0, 0]})


def test_half_precision_parameters_share_moves_smaller_than_their_steps():
    of = model().bfloat16()
    optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
    compression = Compression.none(of.named_parameters())
    local = of_one_rank(optimizer, compression, every=1, outer=Averaging(lr=2**-9))
    start = [p.detach().clone() for p in of.parameters()]
    for _ in range(512):  # each moves what is shared by 2^-15, less than bfloat16 can add to most of these numbers
        for parameter in of.parameters():
            parameter.data.add_(2**-6)
        local.step()
        for parameter, shared in zip(of.parameters(), local._shared.parameters):
            torch.testing.assert_close(parameter.detach(), shared.bfloat16(), rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(start, of.parameters()))


def test_elastic_workers_go_back_to_what_was_committed_and_on_with_what_rank_0_shares():
    of = model()
    optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
    compression = Compression.topk(of.named_parameters(), density=0.1, min_numel=1)
    local = of_one_rank(optimizer, compression, every=2, outer=Nesterov())
    train(of, optimizer, range(4), local)
    keeper, committed = LocalStepsKeeper(local), local.state_dict()
    train(of, optimizer, range(4, 7), local)
    assert (local.steps, local.rounds) == (7, 3)
    keeper.restore(local)
    restored = local.state_dict()
    assert {key: restored[key] for key in ("steps", "rounds", "since")} == {"steps": 4, "rounds": 2, "since": [0]}
    for name, shared in committed["shared"].items():
        assert torch.equal(shared, restored["shared"][name])
        assert torch.equal(committed["moments"][name]["momentum"], restored["moments"][name]["momentum"])

    optimizer, pairs = named()
    others = of_one_rank(optimizer, Compression.none(pairs), every=2, outer=Nesterov())
    given = []
    LocalStepsKeeper(others).sync(others, lambda mine: given.append(mine) or (committed, mine[1]), 2)
    assert others.steps == given[0][0]["steps"] + 4 == 4
    assert torch.equal(others.state_dict()["shared"]["0.weight"], committed["shared"]["0.weight"])
