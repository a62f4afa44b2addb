"""torch.amp.GradScaler under hvd_compress.mpi, by PyTorch's own recipe; and gradients that are changed too early."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression

from .job import Job
from .training import (
    COMPRESSIONS,
    Gradients,
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

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda of: torch.optim.SGD(of, lr=0.1, momentum=0.9, foreach=False),
    "sgd, foreach": lambda of: torch.optim.SGD(of, lr=0.1, momentum=0.9, foreach=True),
    "sgd, fused": lambda of: torch.optim.SGD(of, lr=0.1, momentum=0.9, fused=True),
    "adamw, foreach": lambda of: torch.optim.AdamW(of, lr=0.01, foreach=True),
    "adamw, fused": lambda of: torch.optim.AdamW(of, lr=0.01, fused=True),
    "adagrad, fused": lambda of: torch.optim.Adagrad(of, lr=0.1, fused=True),
}


def lossless(named) -> object:
    return Compression.topk(named, density=1.0, min_numel=1)


def known(of: dict[str, Tensor], rank: int, step: int, size: int, bad: float) -> Gradients:
    """In step 2 the last rank alone has something that is not finite."""
    mine = gradients(of, rank, step)
    if step == 2 and rank == size - 1:
        mine["b"].view(-1)[7] = bad
    return mine


def scaled_step(optimizer, scaler, of: dict[str, Tensor], mine: Gradients) -> None:
    optimizer.zero_grad()
    scaler.scale(sum((p * mine[name]).sum() for name, p in of.items())).backward()
    scaler.step(optimizer)
    scaler.update()


def scaler_of(**options: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 2, **options})


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_recipe_of_torch_trains_as_one_process_does(job: Job, kind: str, bad: float) -> None:
    of, alone = parameters(), parameters()
    optimizer = job.distribute(OPTIMIZERS[kind](list(of.values())), of.items(), lossless(of.items()))
    reference = OPTIMIZERS[kind](list(alone.values()))
    scaler, expected = scaler_of(), scaler_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(7):
            scaled_step(optimizer, scaler, of, known(of, job.rank, step, job.size, bad))
            of_ranks = [known(of, rank, step, job.size, bad) for rank in range(job.size)]
            mean = {name: sum(mine[name] for mine in of_ranks) / job.size for name in of}
            scaled_step(reference, expected, alone, mean)
            assert scaler.state_dict() == expected.state_dict()
    assert scaler.get_scale() == 4096.0  # it went down, and grew again
    assert_close(copy(of), copy(alone))
    assert_replicated(job, of)


@pytest.mark.parametrize("kind", ["adacomp", "topk", "powersgd", "dgc"])
def test_residuals_are_in_the_unit_of_the_scaler_at_hand(job: Job, kind: str) -> None:
    """Scales are powers of two: if all is right, not a bit depends on them. Nobody sets compression.loss_scale."""
    trained = []
    for growth_interval in (2, 100):
        of = parameters()
        compression = COMPRESSIONS[kind](of.items())
        optimizer = job.distribute(sgd(of), of.items(), compression)
        scaler = scaler_of(init_scale=4.0, growth_interval=growth_interval)
        for step in range(7):
            scaled_step(optimizer, scaler, of, known(of, job.rank, step, job.size, math.inf))
        held = {name: held / compression.loss_scale for name, held in residuals(compression).items()}
        trained.append(copy(of) | ({} if kind == "powersgd" else held))
    # What MPI adds up itself it may add in another order each time, where there are more than two ranks.
    (assert_close if kind in ("powersgd", "dgc") and job.size > 2 else assert_equal)(*trained)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("skips", [True, False])
def test_unscaling_and_clipping_after_synchronize(job: Job, kind: str, skips: bool) -> None:
    of, alone = parameters(), parameters()
    optimizer = job.distribute(OPTIMIZERS[kind](list(of.values())), of.items(), lossless(of.items()))
    reference = OPTIMIZERS[kind](list(alone.values()))
    scaler, expected = scaler_of(), scaler_of()

    def clipped_step(optimizer, scaler, of: dict[str, Tensor], mine: Gradients) -> None:
        optimizer.zero_grad()
        scaler.scale(sum((p * mine[name]).sum() for name, p in of.items())).backward()
        if synchronize := getattr(optimizer, "synchronize", None):
            synchronize()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(of.values(), 0.3)
        if synchronize and skips:
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()

    with warnings.catch_warnings():
        warnings.simplefilter("error" if skips else "ignore")
        for step in range(5):
            clipped_step(optimizer, scaler, of, known(of, job.rank, step, job.size, math.inf))
            of_ranks = [known(of, rank, step, job.size, math.inf) for rank in range(job.size)]
            clipped_step(
                reference, expected, alone, {name: sum(mine[name] for mine in of_ranks) / job.size for name in of}
            )
            assert scaler.state_dict() == expected.state_dict()
    assert_close(copy(of), copy(alone))
    assert_replicated(job, of)


def test_a_scaler_that_is_disabled_changes_nothing(job: Job) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    simulation = Simulation(job.size, COMPRESSIONS["topk"], of)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        scaled_step(optimizer, scaler, of, gradients(of, job.rank, step))
        assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))


def test_asking_whether_step_unscales_does_not_synchronize(job: Job) -> None:
    of = parameters()
    optimizer = job.distribute(torch.optim.Adam(of.values(), fused=True), of.items(), lossless(of.items()))
    backward(of, gradients(of, job.rank, 0))
    before = grads(of)
    assert optimizer._step_supports_amp_scaling is True
    assert_equal(grads(of), before)
    plain = job.distribute(sgd(of), of.items(), lossless(of.items()))
    assert plain._step_supports_amp_scaling is False


def clip(of: dict[str, Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_([p for p in of.values() if p.grad is not None], 0.01)


def replace(of: dict[str, Tensor]) -> None:
    of["b"].grad = of["b"].grad / 2


CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "norm": clip,
    "value": lambda of: torch.nn.utils.clip_grad_value_(of.values(), 0.01),
    "in place": lambda of: of["b"].grad.mul_(0.5),
    "replaced": replace,
}


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("step_of_change", [0, 2])
@pytest.mark.parametrize("how", CHANGES)
def test_gradients_changed_before_synchronize_are_refused_on_every_rank(
    several: Job, how: str, step_of_change: int, everywhere: bool
) -> None:
    """In the first step, when all gradients wait for step(), and later, when they travel. It can be made good."""
    job = several
    of = parameters()
    compression = COMPRESSIONS["topk"](of.items())
    optimizer = job.distribute(sgd(of), of.items(), compression)
    simulation = Simulation(job.size, COMPRESSIONS["topk"], of)
    for step in range(4):
        if step == step_of_change:
            optimizer.zero_grad()
            backward(of, gradients(of, job.rank, 99))
            if everywhere or job.rank == 1:
                CHANGES[how](of)
            before, residuals_before = copy(of), copy(residuals(compression))
            culprits = "ranks 0, 1" if everywhere else "rank 1 after"
            with pytest.raises(
                RuntimeError, match=rf"changed on {culprits}(.|\n)*'b'(.|\n)*optimizer\.synchronize\(\)"
            ):
                optimizer.step()
            assert_equal(copy(of), before)
            assert_equal(residuals(compression), residuals_before)
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))
    assert_replicated(job, of)


@pytest.mark.parametrize("steps", [0, 2])
def test_unscaling_before_synchronize_is_refused(several: Job, steps: int) -> None:
    job = several
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), lossless(of.items()))
    scaler = scaler_of()
    for step in range(steps):
        scaled_step(optimizer, scaler, of, gradients(of, job.rank, step))
    scaler.scale(sum((p * gradients(of, job.rank, 5)[name]).sum() for name, p in of.items())).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"optimizer\.synchronize\(\)"):
        scaler.step(optimizer)


def test_a_gradient_changed_by_a_hook_of_the_user_before_ours_is_exchanged_so(job: Job) -> None:
    def double(p: Tensor) -> None:
        p.grad.mul_(2)

    of = parameters()
    for p in of.values():
        p.register_post_accumulate_grad_hook(double)
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    simulation = Simulation(job.size, COMPRESSIONS["topk"], of)
    for step in range(3):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        doubled = [{name: 2 * g for name, g in gradients(of, rank, step).items()} for rank in range(job.size)]
        assert_equal(grads(of), simulation.exchange(doubled))
