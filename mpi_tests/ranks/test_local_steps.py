"""Local steps on every back end: by the formulas, to equal bits on all ranks, through uneven ends and checkpoints."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvd_compress import Compression, GradientCompression, MismatchError
from hvd_compress.local_steps import Averaging, LocalSteps, Nesterov, Outer, SparseLoCo

from .job import Job
from .test_replicas import MAKE, loss, model
from .training import OPTIONS, assert_close, assert_equal, assert_replicated, copy, digest

RULES: dict[str, Outer] = {"averaging": Averaging(0.9), "nesterov": Nesterov(), "sparseloco": SparseLoCo(beta=0.5)}


def inner(of: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(of.parameters(), lr=1e-2)


def train(of: nn.Module, optimizer: torch.optim.Optimizer, local: LocalSteps | None, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(of, rank, step).backward()
        optimizer.step()
        if local:
            local.step()


def expected(rule: str, size: int, every: int, rounds: int, keep: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """By the formulas, in one process; `keep` is what a rank sends of what it owes."""
    models = [model() for _ in range(size)]
    optimizers = [inner(of) for of in models]
    shared = copy(dict(models[0].named_parameters()))
    unsent = [{name: torch.zeros_like(p) for name, p in shared.items()} for _ in range(size)]
    momentum = {name: torch.zeros_like(p) for name, p in shared.items()}
    for turn in range(rounds):
        for rank, of in enumerate(models):
            train(of, optimizers[rank], None, rank, range(turn * every, (turn + 1) * every))
        for name in shared:
            sent = []
            for rank, of in enumerate(models):
                owed = of.get_parameter(name).detach() - shared[name]
                owed = owed + (0.5 if rule == "sparseloco" else 1.0) * unsent[rank][name]
                sent.append(keep(owed) if size > 1 else owed)
                unsent[rank][name] = owed - sent[-1]
            mean = torch.stack(sent).sum(0) / size
            if rule == "nesterov":
                momentum[name] = 0.9 * momentum[name] + mean
                shared[name] = shared[name] + 0.7 * (mean + 0.9 * momentum[name])
            else:
                shared[name] = shared[name] + {"averaging": 0.9, "sparseloco": 1.0}[rule] * mean
        for of in models:
            for name, parameter in of.named_parameters():
                parameter.data.copy_(shared[name])
    return shared


def largest(owed: Tensor) -> Tensor:
    """A tenth of the elements."""
    kept = torch.zeros_like(owed).view(-1)
    index = owed.abs().view(-1).topk(math.ceil(0.1 * owed.numel())).indices
    kept[index] = owed.view(-1)[index]
    return kept.view(owed.shape)


def top_tenth(of: nn.Module, **options: str) -> GradientCompression:
    return Compression.topk(of.named_parameters(), density=0.1, **{"topology": "gather", **OPTIONS, **options})


@pytest.mark.parametrize("rule", RULES)
def test_parameters_are_what_the_formulas_say(job: Job, rule: str) -> None:
    for compressed in (False, True):
        mine = model()
        compression = top_tenth(mine) if compressed else Compression.none(mine.named_parameters())
        optimizer = inner(mine)
        with LocalSteps(optimizer, compression, every=3, outer=RULES[rule]) as local:
            train(mine, optimizer, local, job.rank, range(9))
        assert (local.steps, local.rounds) == (9, 3)
        named = dict(mine.named_parameters())
        assert_replicated(job, named)
        assert_close(named, expected(rule, job.size, 3, 3, largest if compressed else torch.clone), 1e-5)


@pytest.mark.parametrize("method", ["onebit", "powersgd", "scattered"])
def test_frames_sums_and_scattered_frames_give_equal_replicas(job: Job, method: str) -> None:
    mine = model()
    optimizer = inner(mine)
    compression = MAKE[method](mine.named_parameters())
    with LocalSteps(optimizer, compression, every=4, fragments=2) as local:
        train(mine, optimizer, local, job.rank, range(9))
        # A fragment each at steps 2, 4, 6 and 8, the first of which is a tenth of all elements.
        assert local.rounds == 4
    assert_replicated(job, dict(mine.named_parameters()))
    if job.size > 1:
        assert 0 < compression.telemetry.total.sent_bytes < compression.telemetry.total.raw_bytes


def test_ranks_that_end_earlier_take_part_until_all_do(several: Job) -> None:
    job = several
    mine = model()
    optimizer = inner(mine)
    with LocalSteps(optimizer, top_tenth(mine), every=3, outer=Averaging()) as local:
        train(mine, optimizer, local, job.rank, range(2 + 4 * job.rank))
    assert local.steps == 2 + 4 * job.rank
    assert_replicated(job, dict(mine.named_parameters()))


def test_steps_that_a_grad_scaler_skips_skip_no_exchange(job: Job) -> None:
    mine = model()
    optimizer = inner(mine)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    skipped = 0
    with LocalSteps(optimizer, top_tenth(mine), every=4) as local:
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(loss(mine, job.rank, step)).backward()
            if step in (3, 5) and job.rank == job.size - 1:
                next(mine.parameters()).grad.view(-1)[0] = float("inf")
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
            local.step()
        assert local.rounds == 2
    assert sum(job.allgather(skipped)) == 2
    assert_replicated(job, dict(mine.named_parameters()))


@pytest.mark.parametrize("fragments", [1, 3])
def test_a_checkpoint_between_exchanges_resumes_to_the_same_bits(job: Job, fragments: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, LocalSteps]:
        of = model()
        optimizer = inner(of)
        outer = SparseLoCo(beta=0.5) if fragments == 1 else Nesterov()
        return of, optimizer, LocalSteps(optimizer, top_tenth(of), every=3, fragments=fragments, outer=outer)

    whole, optimizer, local = start()
    train(whole, optimizer, local, job.rank, range(5))
    states = [part.state_dict() for part in (whole, optimizer, local, local.compression)]
    saved = io.BytesIO()
    torch.save(states, saved)
    train(whole, optimizer, local, job.rank, range(5, 11))
    local.finish()
    local.close()

    resumed, optimizer, local = start()
    saved.seek(0)
    for part, state in zip((resumed, optimizer, local, local.compression), torch.load(saved, weights_only=True)):
        part.load_state_dict(state)
    train(resumed, optimizer, local, job.rank, range(5, 11))
    local.finish()
    local.close()
    assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    assert_replicated(job, dict(resumed.named_parameters()))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("every", MismatchError, "every is 2 on rank 0 and 3 on rank"),
        ("start", MismatchError, "started from different parameters. Broadcast"),
        ("frozen", MismatchError, "train different parameters in step 4"),
        ("finite", FloatingPointError, "parameters of rank 1 are not finite"),
    ],
)
def test_what_cannot_go_on_is_one_error_on_every_rank(several: Job, what: str, error: type, message: str) -> None:
    job = several
    mine = model()
    last = job.rank == 1
    if what == "start" and last:
        mine[3].weight.data[0, 0] += 1
    optimizer = inner(mine)
    local = LocalSteps(optimizer, top_tenth(mine), every=3 if what == "every" and last else 2)
    with pytest.raises(error, match=message):  # noqa: PT012
        train(mine, optimizer, local, job.rank, range(2))
        if what == "frozen" and last:
            mine[3].weight.requires_grad_(False)
        if what == "finite" and last:
            mine[0].weight.data[0, 0, 0, 0] = float("nan")
        train(mine, optimizer, local, job.rank, range(2, 6))
    local.close()
    job.barrier()


def test_in_sites_of_two_a_gradient_exchange_goes_on_inside_each(job: Job) -> None:
    """Every gradient inside a site; every few steps a share of each of its ranks between the sites."""
    if job.size != 4:
        pytest.skip("two sites of two ranks")
    site = job.split([[0, 1], [2, 3]])
    mine = model()
    named = list(mine.named_parameters())
    inside = Compression.none(named, **site.of_compression)
    optimizer = job.distribute(inner(mine), named, inside, **site.of_optimizer)
    between = top_tenth(mine, topology="hierarchical", ranks_per_node=2)
    with LocalSteps(optimizer, between, every=3, outer=Averaging()) as local:
        train(mine, optimizer, local, job.rank, range(5))
        of_site = job.allgather(digest(dict(named)))
        assert of_site[0] == of_site[1] != of_site[2] == of_site[3]
    assert_replicated(job, dict(named))
