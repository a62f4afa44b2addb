"""A gradient that is not finite on one rank: no rank steps, no residual changes, and training goes on."""

import math

import pytest
import torch
from torch import Tensor, nn

from hvd_compress import Compression

from .job import Job
from .training import (
    COMPRESSIONS,
    IN_FRAMES,
    IN_SUMS,
    WITH_RESIDUALS,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    copy,
    gradients,
    parameters,
    residuals,
    sgd,
)

SHAPES = {"a": (30, 20), "b": (8, 4, 3, 3), "flat": (40,), "c": (40, 10)}


def copied_residuals(compression) -> dict[str, Tensor]:
    return copy(residuals(compression))


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize("where", ["b", "flat"])
@pytest.mark.parametrize("kind", ["adacomp", "topk", "terngrad", *IN_SUMS])
def test_grad_scaler_skips_the_step_on_every_rank(several: Job, kind: str, where: str, bad: float) -> None:
    job = several
    of = parameters(SHAPES)
    compression = COMPRESSIONS[kind](of.items())
    optimizer = job.distribute(sgd(of), of.items(), compression)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        compression.loss_scale = scaler.get_scale()
        known = gradients(of, job.rank, step)
        poisoned = step == 2
        if poisoned and job.rank == job.size - 1:
            known[where].view(-1)[5] = bad
        before, parameters_before, scale = copied_residuals(compression), copy(of), scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(sum((p * known[name]).sum() for name, p in of.items())).backward()
        optimizer.synchronize()
        assert poisoned == (not all(torch.isfinite(p.grad).all() for p in of.values()))
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if poisoned else scale)
        after = copied_residuals(compression)
        if poisoned:
            assert_equal(after, before)
            assert_equal(copy(of), parameters_before)
        elif kind in WITH_RESIDUALS:
            assert after.keys() == {"a", "b", "c"}
            assert all(not torch.equal(after[name], before.get(name, torch.zeros(()))) for name in after)
        assert all(torch.isfinite(p).all() for p in of.values())
        assert_replicated(job, of)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", [*IN_FRAMES, *IN_SUMS])
def test_every_rank_sees_a_tensor_that_is_not_finite_on_one(several: Job, kind: str, bad: float) -> None:
    job = several
    of = parameters(SHAPES)
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()))
    known = gradients(of, job.rank, 0)
    if job.rank == 0:
        known["a"][3, 4] = bad
    backward(of, known)
    optimizer.synchronize()
    assert not torch.isfinite(of["a"].grad).any()
    for name in of.keys() - {"a"}:
        assert torch.isfinite(of[name].grad).all()


@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("kind", WITH_RESIDUALS)
def test_a_bad_sparse_gradient_keeps_residuals(several: Job, kind: str) -> None:
    job = several
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 30, bias=False)
    named = [("embedding", embedding.weight), ("linear", linear.weight)]
    compression = COMPRESSIONS[kind](named)
    optimizer = job.distribute(torch.optim.SGD([p for _, p in named], lr=0.1), named, compression)
    for step in range(3):
        before = copied_residuals(compression)
        optimizer.zero_grad()
        factor = math.nan if (step, job.rank) == (2, 0) else 1.0
        known = gradients({"linear": linear.weight}, job.rank, step)["linear"]
        (embedding(torch.tensor([1, 2])).sum() * factor + (linear.weight * known).sum()).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            if step < 2:
                optimizer.step()
        after = copied_residuals(compression)
        if step == 2:
            assert_equal(after, before)
        else:
            assert not torch.equal(after["linear"], before.get("linear", torch.zeros(())))


@pytest.mark.parametrize("kind", WITH_RESIDUALS)
def test_residuals_follow_the_loss_scale(several: Job, kind: str) -> None:
    job = several
    of = parameters(SHAPES)
    compression = COMPRESSIONS[kind](of.items())
    optimizer = job.distribute(sgd(of), of.items(), compression)
    compression.loss_scale = 8.0
    backward(of, gradients(of, job.rank, 0))
    optimizer.step()
    before = copied_residuals(compression)
    compression.loss_scale = 2.0
    assert_equal(copied_residuals(compression), {name: residual / 4 for name, residual in before.items()})


@pytest.mark.parametrize("kind", [*WITH_RESIDUALS, *IN_SUMS, "stochastic_pruning"])
def test_training_does_not_depend_on_the_loss_scale(several: Job, kind: str) -> None:
    """Scales are powers of two: nothing is rounded, so even the bits are the same."""
    job = several
    trained = []
    for scales in ([1.0] * 6, [64.0, 64.0, 32.0, 32.0, 128.0, 16.0]):
        of = parameters(SHAPES)
        topk = {"topology": "scatter"} if kind == "scattered" else {}
        method = getattr(Compression, "topk" if topk else kind)
        compression = method(of.items(), min_numel=1, **topk)
        optimizer = job.distribute(sgd(of), of.items(), compression)
        for step, scale in enumerate(scales):
            compression.loss_scale = scale
            optimizer.zero_grad()
            backward(of, {name: g * scale for name, g in gradients(of, job.rank, step).items()})
            optimizer.synchronize()
            for p in of.values():
                p.grad /= scale
            with optimizer.skip_synchronize():
                optimizer.step()
        trained.append({name: p for name, p in copy(of).items() if name != "flat"})
    # What the backend adds up itself it may add in another order each time, where there are more than two ranks.
    (assert_close if kind in IN_SUMS and job.size > 2 else assert_equal)(*trained)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_loss_scale_must_be_positive_and_finite(job: Job, scale: float) -> None:
    compression = Compression.topk(parameters().items())
    with pytest.raises(ValueError, match="loss_scale"):
        compression.loss_scale = scale
