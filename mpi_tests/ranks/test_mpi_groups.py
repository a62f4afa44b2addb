"""The distributed optimizer of hvd_compress.mpi as an optimizer of torch: groups, state, hooks, schedulers, copies."""

import copy as copying
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvd_compress import Compression

from .job import Job
from .training import (
    COMPRESSIONS,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    copy,
    gradients,
    grads,
    parameters,
    residuals,
    sgd,
)

pytestmark = pytest.mark.usefixtures("plain_mpi")

MORE = {"x": (6, 5), "y": (7,)}


def distributed(job: Job, of: dict[str, Tensor], kind: str = "topk", **options: object):
    return job.distribute(sgd(of, **options), of.items(), COMPRESSIONS[kind](of.items()))


def train(job: Job, optimizer, of: dict[str, Tensor], step: int = 0) -> None:
    optimizer.zero_grad()
    backward(of, gradients(of, job.rank, step))
    optimizer.step()


GROUPS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "list": lambda of: list(of.values()),
    "generator": lambda of: iter(of.values()),
    "tensor": lambda of: of["x"],
    "named": lambda of: list(of.items()),
}


@pytest.mark.parametrize("how", GROUPS)
def test_a_group_that_the_compression_does_not_know_is_refused_as_a_whole(job: Job, how: str) -> None:
    of, more = parameters(), parameters(MORE)
    optimizer = distributed(job, of)
    before = copying.copy(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"\(6, 5\).*named_parameters"):
        optimizer.add_param_group({"params": GROUPS[how](more), "lr": 0.5})
    assert optimizer.param_groups == before
    for step in range(2):
        train(job, optimizer, of, step)
    assert_replicated(job, of)


@pytest.mark.parametrize("how", ["list", "generator", "tensor"])
def test_a_group_added_later_is_trained(job: Job, how: str) -> None:
    of, more = parameters(), parameters(MORE)
    everything = of | more
    make = COMPRESSIONS["topk"]
    optimizer = job.distribute(sgd(of), everything.items(), make(everything.items()))
    simulation = Simulation(job.size, make, everything)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": GROUPS[how](more), "lr": 0.5})
            assert optimizer.param_groups[1]["lr"] == 0.5
        added = [] if step < 2 else ["x"] if how == "tensor" else ["x", "y"]
        trained = of | {name: more[name] for name in added}
        before = copy(everything)
        train(job, optimizer, trained, step)
        assert_close(grads(everything), simulation.exchange([gradients(trained, r, step) for r in range(job.size)]))
        assert all(torch.equal(before[name], everything[name]) != (name in trained) for name in everything)


@pytest.mark.parametrize("step_of_change", [0, 2])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_parameter_that_is_replaced_is_named_by_every_rank(job: Job, everywhere: bool, step_of_change: int) -> None:
    of = parameters()
    optimizer = distributed(job, of)
    for step in range(step_of_change):
        train(job, optimizer, of, step)
    new = dict(of)
    if everywhere or job.rank == job.size - 1:
        new["b"] = nn.Parameter(of["b"].detach().clone())
        optimizer.param_groups[0]["params"] = list(new.values())
    before = copy(new)
    backward(new, gradients(new, job.rank, 5))
    where = f"rank {job.size - 1}:" if job.size > 1 and not everywhere else ""
    with pytest.raises(ValueError, match=rf"{where}.*parameter 'b' of group 0 was replaced"):
        optimizer.step()
    assert_equal(copy(new), before)
    optimizer.param_groups[0]["params"] = list(of.values())
    train(job, optimizer, of, 6)
    assert_replicated(job, of)


@pytest.mark.parametrize("loads", [0, 1, 2])
def test_step_hooks_fire_once_and_see_combined_gradients(job: Job, loads: int) -> None:
    of = parameters()
    make = COMPRESSIONS["topk"]
    inner = sgd(of, momentum=0.9)
    seen: list[object] = []
    inner.register_step_pre_hook(lambda *_: seen.append("registered before"))
    optimizer = job.distribute(inner, of.items(), make(of.items()))
    optimizer.register_step_pre_hook(lambda *_: seen.append(grads(of)))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    simulation = Simulation(job.size, make, of)
    for step in range(2):
        for _ in range(loads):
            optimizer.load_state_dict(optimizer.state_dict())
        seen.clear()
        train(job, optimizer, of, step)
        expected = simulation.exchange([gradients(of, rank, step) for rank in range(job.size)])
        assert [seen[0], seen[2]] == ["registered before", "after"]
        assert len(seen) == 3
        assert_equal(seen[1], expected)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_who_holds_groups_and_state_keeps_them_when_another_state_is_loaded(job: Job, cls: type) -> None:
    of = parameters()
    inner = cls(of.values(), lr=0.1, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    optimizer = job.distribute(inner, of.items(), COMPRESSIONS["topk"](of.items()))
    train(job, optimizer, of)
    saved = copying.deepcopy(optimizer.state_dict())
    train(job, optimizer, of, 1)
    groups, state = optimizer.param_groups, optimizer.state
    saved["param_groups"][0]["lr"] = 0.7
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups is groups is inner.param_groups
    assert optimizer.state is state is inner.state
    assert inner.param_groups[0]["lr"] == 0.7
    found = optimizer.state_dict()
    assert found["state"].keys() == saved["state"].keys()
    for index, held in saved["state"].items():
        assert all(torch.equal(torch.as_tensor(found["state"][index][key]), torch.as_tensor(held[key])) for key in held)
    train(job, optimizer, of, 2)
    assert_replicated(job, of)


def test_a_scheduler_made_before_keeps_its_hold_without_a_warning(job: Job) -> None:
    of = parameters()
    inner = sgd(of, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, gamma=0.5)
    optimizer = job.distribute(inner, of.items(), COMPRESSIONS["topk"](of.items()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
            before = copy(of)
            train(job, optimizer, of, step)
            assert_equal(copy(of), {name: before[name] - 0.5**step * of[name].grad for name in of})
            scheduler.step()


COPIES: dict[str, Callable[[object], object]] = {
    "copy": copying.copy,
    "deepcopy": copying.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda optimizer: torch.save(optimizer, io.BytesIO()),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_the_optimizer_are_refused_in_one_sentence(job: Job, how: str) -> None:
    of = parameters()
    optimizer = distributed(job, of, momentum=0.9)
    train(job, optimizer, of)
    with pytest.raises(TypeError, match=r"SGD is tied to its ranks.*save optimizer\.state_dict\(\)"):
        COPIES[how](optimizer)
    train(job, optimizer, of, 1)
    torch.save(optimizer.state_dict(), io.BytesIO())
    assert_replicated(job, of)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["topk", "dgc", "powersgd", "terngrad", "lgreco"])
def test_a_copied_compression_trains_on_where_the_original_was(job: Job, kind: str, how: str) -> None:
    def make(named):
        if kind == "lgreco":
            base = Compression.topk(named, density=0.2, min_numel=1)
            return Compression.lgreco(base, interval=3, warmup_steps=2, window=1)
        return COMPRESSIONS[kind](named)

    of = parameters()
    compression = make(of.items())
    optimizer = job.distribute(sgd(of), of.items(), compression)
    for step in range(4):
        train(job, optimizer, of, step)
    pair = (of, compression)
    theirs, copied = copying.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert repr(copied) == repr(compression)
    other = job.distribute(sgd(theirs), theirs.items(), copied)
    for step in range(4, 8):
        train(job, optimizer, of, step)
        train(job, other, theirs, step)
    if job.size == 1 or kind in ("dgc", "powersgd", "lgreco"):
        for name in of:
            torch.testing.assert_close(of[name], theirs[name], rtol=1e-5, atol=1e-5)
    else:
        assert_equal(copy(of), copy(theirs))
        assert_equal(residuals(compression), residuals(copied))
